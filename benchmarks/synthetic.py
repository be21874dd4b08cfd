"""Checkpoints of any shape with random weights, written tensor by tensor: nothing larger than a tensor is in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glmexport.demo import demo_checkpoint


def write_synthetic(directory: Path, config: dict[str, Any], seed: int = 0) -> None:
    """A ``glm4`` checkpoint, or ``glm4_moe`` if ``config`` says so, one shard a layer, with the demo's tokenizer."""
    directory.mkdir(parents=True)
    for file in demo_checkpoint().iterdir():
        if file.name not in ("config.json", "model.safetensors", "README.md"):
            shutil.copyfile(file, directory / file.name)
    base = json.loads((demo_checkpoint() / "config.json").read_text(encoding="utf-8"))
    config = base | config
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    weight_map, layers = {}, config["num_hidden_layers"]
    for shard in range(layers + 1):
        shapes = _outer(config) if shard == layers else _layer(config, shard)
        name = f"model-{shard + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file({key: _random(key, shape, generator) for key, shape in shapes.items()}, directory / name)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _random(key: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
    return values + 1 if "norm" in key else values


def _outer(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }


def _layer(config: dict[str, Any], index: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (heads, hidden),
        "self_attn.k_proj.weight": (kv_heads, hidden),
        "self_attn.v_proj.weight": (kv_heads, hidden),
        "self_attn.o_proj.weight": (hidden, heads),
        **_mlp("mlp", hidden, inner),
    }
    mixture = config["model_type"] == "glm4_moe"
    if mixture and index >= config["first_k_dense_replace"]:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("mlp.")}
        shapes |= _experts(hidden, config["moe_intermediate_size"], config["n_routed_experts"])
    if config["attention_bias"]:
        shapes |= {
            "self_attn.q_proj.bias": (heads,),
            "self_attn.k_proj.bias": (kv_heads,),
            "self_attn.v_proj.bias": (kv_heads,),
        }
    norms = ["input_layernorm", "post_attention_layernorm"]
    if not mixture:
        norms += ["post_self_attn_layernorm", "post_mlp_layernorm"]
    shapes |= {f"{norm}.weight": (hidden,) for norm in norms}
    return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}


def _mlp(name: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.gate_up_proj.weight": (2 * inner, hidden), f"{name}.down_proj.weight": (hidden, inner)}


def _experts(hidden: int, inner: int, count: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.gate.weight": (count, hidden),
        "mlp.gate.e_score_correction_bias": (count,),
        **_mlp("mlp.shared_experts", hidden, inner),
    }
    for index in range(count):
        shapes |= _mlp(f"mlp.experts.{index}", hidden, inner)
    return shapes
