"""transformers in bf16, the original as it is.

    python by_transformers.py CHECKPOINT CAPACITY THREADS VOCABULARY

Speaks the protocol of common.py.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from common import Runtime, serve


class Transformers(Runtime):
    def __init__(self, checkpoint: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, local_files_only=True
        ).eval()
        self.name = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.cache: Any = None
        self.best = 0

    def start(self, ids: list[int]) -> None:
        self.cache = None
        self.extend(ids)

    def extend(self, ids: list[int]) -> None:
        with torch.inference_mode():
            output = self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        self.best = int(output.logits[0, -1].argmax())

    def step(self) -> None:
        self.extend([self.best])


if __name__ == "__main__":
    checkpoint, *numbers = sys.argv[1:]
    _, threads, vocabulary = map(int, numbers)
    serve(Transformers, checkpoint, threads, vocabulary=vocabulary)
