"""Writes matrices.safetensors and configs.json of this folder. They were written by compressed-tensors 0.20.1:

    python -m pip install compressed-tensors==0.20.1 torch
    python tests/checkpoint/compressed_tensors/write.py tests/checkpoint/compressed_tensors

By the name of a case: the tensors of one linear of 12 x 128 weights, and ``expected``, which the library makes of them
with scales in fp32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

INT, FLOAT = {"type": "int"}, {"type": "float", "num_bits": 8, "symmetric": True}
TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "w4g32-sym": (
        "pack-quantized", INT | {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}, None
    ),
    "w4g32": ("pack-quantized", INT | {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, None),
    "w8row-sym": ("pack-quantized", INT | {"num_bits": 8, "strategy": "channel", "symmetric": True}, None),
    "w2g64": ("pack-quantized", INT | {"num_bits": 2, "strategy": "group", "group_size": 64, "symmetric": False}, None),
    "int8-row": ("int-quantized", INT | {"num_bits": 8, "strategy": "channel", "symmetric": True}, INT | TOKENS),
    "fp8-row": ("float-quantized", FLOAT | {"strategy": "channel"}, {"type": "float"} | TOKENS),
    "fp8-matrix": ("float-quantized", FLOAT | {"strategy": "tensor"}, None),
    "fp8-16x32": ("float-quantized", FLOAT | {"strategy": "block", "block_structure": [16, 32]}, None),
}  # fmt: skip


def ranges(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest weight for each scale."""
    if args.strategy == "group":
        grouped = weight.reshape(len(weight), -1, args.group_size)
        return grouped.amin(-1), grouped.amax(-1)
    if args.strategy == "channel":
        return weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    height, width = args.block_structure
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % height))
    blocks = padded.reshape(-1, height, weight.shape[1] // width, width)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def main(directory: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors, configs = {}, {}
    for name, (kind, weights, activations) in CASES.items():
        args = QuantizationArgs(**weights)
        given = QuantizationArgs(**activations) if activations else None
        scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=given, format=kind)
        weight = (torch.randn(12, 128, generator=generator) * 0.05 + 0.01).bfloat16()
        scale, zero_point = calculate_qparams(*ranges(weight, args), args)
        state = {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            state["weight_zero_point"] = zero_point
        library = BaseCompressor.get_value_from_registry(kind)
        stored = library.compress(state, scheme)
        expected = library.decompress(stored | {"weight_scale": stored["weight_scale"].float()}, scheme)["weight"]
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in stored.items()}
        tensors[f"{name}.expected"] = expected.float().contiguous()
        groups = {"group_0": scheme}
        config = QuantizationConfig(
            config_groups=groups, format=kind, quantization_status="compressed", ignore=["lm_head"]
        )
        configs[name] = json.loads(config.model_dump_json())
    save_file(tensors, directory / "matrices.safetensors")
    (directory / "configs.json").write_text(json.dumps(configs, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
