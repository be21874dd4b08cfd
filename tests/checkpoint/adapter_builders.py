"""A small base checkpoint, adapters of it, and their merging, written out naively."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import PREFIX
from checkpoint_builders import write_checkpoint

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
QUERY = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"
HEAD = "lm_head"
#: More rows than are merged at once, and not a multiple of it.
SHAPES = {UP: (600, 24), DOWN: (24, 70), QUERY: (32, 24), EMBED: (520, 24), HEAD: (520, 24)}

Tensors = dict[str, torch.Tensor]


def base_tensors(seed: int = 0) -> Tensors:
    """bf16, with one bias and one norm."""
    torch.manual_seed(seed)
    tensors = {f"{module}.weight": torch.randn(shape).bfloat16() for module, shape in SHAPES.items()}
    return tensors | {f"{QUERY}.bias": torch.randn(32).bfloat16(), "model.norm.weight": torch.ones(24).bfloat16()}


def write_base(directory: Path) -> Tensors:
    """A checkpoint of those tensors; returns them in fp32."""
    tensors = base_tensors()
    write_checkpoint(directory, {"model.safetensors": tensors})
    return {name: tensor.float() for name, tensor in tensors.items()}


def factors(*modules: str, rank: int = 4, dora: bool = False, seed: int = 1) -> Tensors:
    """A and B of each module, and its magnitude with DoRA, under the names that PEFT gives them."""
    torch.manual_seed(seed)
    tensors = {}
    for module in modules:
        rows, columns = SHAPES[module]
        tensors |= adapters.factors(module, rows, columns, rank)
        if dora:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = torch.rand(columns if module == EMBED else rows) + 1
    return tensors


def write_adapter(directory: Path, tensors: Tensors, **settings: Any) -> Path:
    """An adapter that targets every module by its last name."""
    targets = sorted({module.rpartition(".")[2] for module in SHAPES})
    return adapters.write_adapter(directory, tensors, **{"target_modules": targets} | settings)


def merged(base: torch.Tensor, module: str, tensors: Tensors, scale: float) -> torch.Tensor:
    """What the papers say, in double precision."""
    names = ("lora_embedding_A", "lora_embedding_B") if module == EMBED else ("lora_A.weight", "lora_B.weight")
    a, b = (tensors[f"{PREFIX}{module}.{name}"].double() for name in names)
    delta = (b @ a).T if module == EMBED else b @ a
    result = base.double() + scale * delta
    magnitude = tensors.get(f"{PREFIX}{module}.lora_magnitude_vector")
    if magnitude is not None and module == EMBED:
        for column in range(result.shape[1]):
            result[:, column] *= magnitude[column] / result[:, column].norm()
    elif magnitude is not None:
        for row in range(result.shape[0]):
            result[row] *= magnitude[row] / result[row].norm()
    return result
