"""onnxruntime-genai on a model folder: our bundles as they are, and what its own builder makes.

    python by_onnxruntime_genai.py MODEL PIECE CAPACITY THREADS VOCABULARY

PIECE: tokens of a prompt that are read at a time, 0 for all.

Speaks the protocol of common.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
from common import Runtime, serve

os.environ["ORT_DISABLE_TELEMETRY"] = "1"


class Genai(Runtime):
    def __init__(self, model: Path, piece: int, capacity: int, threads: int) -> None:
        import onnxruntime_genai

        config = onnxruntime_genai.Config(str(model))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.library = onnxruntime_genai
        self.model = onnxruntime_genai.Model(config)
        self.parameters = onnxruntime_genai.GeneratorParams(self.model)
        # No end token ends it earlier.
        options = {"chunk_size": piece} if piece else {}
        self.parameters.set_search_options(max_length=capacity, min_length=capacity, do_sample=False, **options)
        self.generator: onnxruntime_genai.Generator | None = None
        self.name = f"onnxruntime-genai {onnxruntime_genai.__version__}"

    def start(self, ids: list[int]) -> None:
        # Before the next one is made, so that no two caches are in memory.
        self.generator = None
        self.generator = self.library.Generator(self.model, self.parameters)
        self.extend(ids)

    def extend(self, ids: list[int]) -> None:
        assert self.generator is not None
        self.generator.append_tokens(np.array([ids], np.int32))

    def step(self) -> None:
        assert self.generator is not None
        self.generator.generate_next_token()


if __name__ == "__main__":
    model, *numbers = sys.argv[1:]
    piece, capacity, threads, vocabulary = map(int, numbers)
    serve(Genai, Path(model), piece, capacity, threads, vocabulary=vocabulary)
