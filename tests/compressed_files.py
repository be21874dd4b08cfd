"""Checkpoints in the layouts of compressed-tensors and AWQ, packed as the layouts are described, not by our code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gptq_files import CONFIG, WEIGHTS, Matrix, words
from safetensors.torch import load_file, save_file

#: The outputs of an AWQ word, from its lowest bits on.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Tensors = dict[str, torch.Tensor]


def weights(**changes: Any) -> dict[str, Any]:
    """The arguments of 4 bits in groups of 32, as llm-compressor writes them; None takes one away."""
    base = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
        "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": False, "type": "int",
    } | changes  # fmt: skip
    if base["strategy"] != "group":
        base["group_size"] = None
    return base


def group(arguments: dict[str, Any] | None = None, *targets: str, **more: Any) -> dict[str, Any]:
    """An entry of config_groups."""
    return {
        "weights": weights() if arguments is None else arguments,
        "input_activations": None,
        "output_activations": None,
        "targets": list(targets) or ["Linear"],
    } | more


def table(*groups: dict[str, Any], kind: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    """A quantization_config."""
    return {
        "config_groups": {f"group_{index}": each for index, each in enumerate(groups or (group(),))},
        "format": kind,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    } | more


def fp8_table(strategy: str = "channel", **more: Any) -> dict[str, Any]:
    """The quantization_config of GLM-4.5-Air-FP8, with its dynamic activations."""
    activations = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "float"}
    arguments = weights(type="float", num_bits=8, symmetric=True, strategy=strategy)
    return table(group(arguments, input_activations=activations), kind="float-quantized", **more)


def packed(module: str, matrix: Matrix, scales: torch.dtype = torch.bfloat16, *, symmetric: bool = False) -> Tensors:
    """The tensors of pack-quantized."""
    tensors = {
        f"{module}.weight_packed": words(matrix.codes, 1, matrix.bits, 0),
        f"{module}.weight_scale": matrix.scales.to(scales),
        f"{module}.weight_shape": torch.tensor(matrix.codes.shape),
    }
    if not symmetric:
        tensors[f"{module}.weight_zero_point"] = words(matrix.zero_points, 0, matrix.bits, 0)
    return tensors


def int8(module: str, matrix: Matrix, scales: torch.dtype = torch.bfloat16, *, symmetric: bool = False) -> Tensors:
    """The tensors of int-quantized."""
    middle = 2 ** (matrix.bits - 1)
    tensors = {
        f"{module}.weight": (matrix.codes - middle).to(torch.int8),
        f"{module}.weight_scale": matrix.scales.to(scales),
    }
    if not symmetric:
        tensors[f"{module}.weight_zero_point"] = (matrix.zero_points - middle).to(torch.int8)
    return tensors


def awq(module: str, matrix: Matrix, *, symmetric: bool = False) -> Tensors:
    """The tensors of AWQ's gemm."""

    def interleaved(values: torch.Tensor) -> torch.Tensor:
        """[N, ...] to [..., N / 8] words."""
        order = torch.tensor([block + place for block in range(0, len(values), 8) for place in AWQ_ORDER])
        return words(values[order].T, 1, 4, 0)

    tensors = {
        f"{module}.qweight": interleaved(matrix.codes),
        f"{module}.scales": matrix.scales.T.contiguous(),
        f"{module}.qzeros": interleaved(matrix.zero_points),
    }
    if symmetric:
        tensors.pop(f"{module}.qzeros")
    return tensors


def awq_table(**changes: Any) -> dict[str, Any]:
    """AutoAWQ's quantization_config."""
    return {
        "bits": 4, "group_size": 32, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
        "zero_point": True,
    } | changes  # fmt: skip


def rounded_to_bf16(matrix: Matrix) -> Matrix:
    """The matrix with scales that bf16 and fp16 both have."""
    return Matrix(matrix.codes, matrix.scales.bfloat16().half(), matrix.zero_points, matrix.groups, matrix.bits)


def fp8(values: torch.Tensor, strategy: str, scales: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 numbers [N, K] of ``values`` and their scales, [N, 1] or [1]."""
    largest = values.abs().amax() if strategy == "tensor" else values.abs().amax(1, keepdim=True)
    scale = (largest / 448).to(scales)
    numbers = (values / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return numbers, scale.reshape(1) if strategy == "tensor" else scale


def rewrite(
    source: Path, directory: Path, write: Callable[[str, torch.Tensor], Tensors | None], settings: dict[str, Any]
) -> Path:
    """The checkpoint ``source`` with the tensors that ``write`` gives for a module's matrix, and their ``settings``."""
    directory.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in (WEIGHTS, CONFIG):
            (directory / path.name).write_bytes(path.read_bytes())
    tensors: Tensors = {}
    for key, tensor in sorted(load_file(source / WEIGHTS).items()):
        given = write(key.removesuffix(".weight"), tensor) if key.endswith("_proj.weight") else None
        tensors |= {key: tensor} if given is None else given
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    config = json.loads((source / CONFIG).read_text(encoding="utf-8")) | {"quantization_config": settings}
    (directory / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return directory
