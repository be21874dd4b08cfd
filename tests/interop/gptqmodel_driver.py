"""Run by an interpreter that has GPTQModel: quantize checkpoints with it, and dump what it computes with them.

    python gptqmodel_driver.py JOB.json

JOB is a list of {"quantize": SOURCE, "settings": {...}, "to": DIRECTORY} and
{"dump": CHECKPOINT, "library": "gptqmodel" | "transformers", "ids": [...], "to": FILE.safetensors}. A dump holds
``logits`` [length, vocabulary] in fp32 arithmetic on the library's plain torch kernel, ``default_logits`` of the
kernel that it picks by itself, and for every linear ``NAME.dequantized`` [N, K] fp16, the library's own dequantization.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTQConfig

TEXT = "A sentence of calibration, long enough to be kept, and the same one every time but for its number: {}."


def quantize(source: str, settings: dict[str, Any], to: str) -> None:
    model = GPTQModel.load(source, QuantizeConfig(**settings), device="cpu")
    model.quantize([TEXT.format(number) for number in range(8)], batch_size=1)
    model.save(to)


def dump(checkpoint: str, library: str, ids: list[int], to: str) -> None:
    tensors: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        tensors["default_logits"] = logits(load(checkpoint, library, None), ids)
        model = load(checkpoint, library, BACKEND.GPTQ_TORCH)
        for name, module in model.named_modules():
            if hasattr(module, "qweight"):
                assert module.scales.dtype == torch.float16
                tensors[f"{name}.dequantized"] = module.dequantize_weight().T.contiguous()
        # transformers' own float() refuses quantized models, whose scales it cannot know to be widened exactly.
        tensors["logits"] = logits(torch.nn.Module.float(model), ids)
    save_file(tensors, to)


def load(checkpoint: str, library: str, backend: BACKEND | None) -> Any:
    if library == "gptqmodel":
        options = {} if backend is None else {"backend": backend}
        return GPTQModel.load(checkpoint, device="cpu", dtype=torch.float16, **options).model.eval()
    config = GPTQConfig(bits=4, backend=None if backend is None else backend.value)
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float16, device_map="cpu", quantization_config=config
    ).eval()


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    answer: torch.Tensor = model(torch.tensor([ids])).logits[0].float().contiguous()
    return answer


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if "quantize" in job:
            quantize(job["quantize"], job["settings"], job["to"])
        else:
            dump(job["dump"], job["library"], job["ids"], job["to"])
