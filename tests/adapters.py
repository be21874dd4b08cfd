"""LoRA adapters as PEFT writes them, for every folder of tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def write_adapter(directory: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    """A LoRA of rank 4 and scale 2, unless ``settings`` say otherwise, on whatever ``tensors`` name."""
    directory.mkdir(parents=True, exist_ok=True)
    defaults = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": None,
        "loftq_config": {},
        "megatron_core": "megatron.core",
        "lora_bias": False,
        "modules_to_save": None,
    }
    (directory / CONFIG).write_text(json.dumps(defaults | settings), encoding="utf-8")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def factors(module: str, rows: int, columns: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """Random A [rank, columns] and B [rows, rank] of a linear, or of the embedding, which PEFT names differently."""
    if module.endswith("embed_tokens"):
        return {
            f"{PREFIX}{module}.lora_embedding_A": torch.randn(rank, rows),
            f"{PREFIX}{module}.lora_embedding_B": torch.randn(columns, rank),
        }
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, columns),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(rows, rank),
    }
