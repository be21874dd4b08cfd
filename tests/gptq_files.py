"""Checkpoints in the GPTQ format with random codes, packed word by word as the format is described, not by our code."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG = "config.json"
QUANTIZE_CONFIG = "quantize_config.json"
WEIGHTS = "model.safetensors"


@dataclass
class Matrix:
    """[N, K] codes, [N, G] scales and zero points, and the group of every input."""

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    groups: torch.Tensor
    bits: int

    @classmethod
    def random(cls, rows: int, columns: int, bits: int, group_size: int, symmetric: bool, seed: int = 0) -> Matrix:
        generator = torch.Generator().manual_seed(seed)
        size = columns if group_size == -1 else group_size
        count = -(-columns // size)
        codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
        scales = (torch.rand(rows, count, generator=generator) * 0.02 + 0.001).half()
        if symmetric:
            # Ours are signed.
            scales *= torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1
            zero_points = torch.full((rows, count), 2 ** (bits - 1))
        else:
            # Every value, with 0 and the largest beside each other.
            zero_points = torch.randint(0, 2**bits, (rows, count), generator=generator)
            zero_points[:4, 0] = torch.tensor([0, 2**bits - 1, 0, 0])
        return cls(codes, scales, zero_points, torch.arange(columns) // size, bits)

    @property
    def weight(self) -> torch.Tensor:
        """[N, K] in fp64."""
        return (self.codes - self.zero_points[:, self.groups]) * self.scales[:, self.groups].double()

    def tensors(self, module: str, version: str, with_groups: bool = True) -> dict[str, torch.Tensor]:
        ones = sum(1 << shift for shift in range(0, 32, self.bits)) if version == "gptq" else 0
        tensors = {
            f"{module}.qweight": words(self.codes.T, 0, self.bits, 0),
            f"{module}.qzeros": words(self.zero_points.T, 1, self.bits, ones),
            f"{module}.scales": self.scales.T.contiguous(),
        }
        if with_groups:
            tensors[f"{module}.g_idx"] = self.groups.int()
        return tensors

    def rows(self, start: int, stop: int) -> Matrix:
        return Matrix(
            self.codes[start:stop], self.scales[start:stop], self.zero_points[start:stop], self.groups, self.bits
        )


def words(values: torch.Tensor, axis: int, bits: int, subtracted: int) -> torch.Tensor:
    """Values packed along ``axis``, one word at a time; ``subtracted`` from every word, modulo 2^32."""
    lists = values.movedim(axis, -1).tolist()
    packed = []
    for line in lists:
        row = []
        for start in range(0, len(line), 32 // bits):
            word = sum(value << (bits * place) for place, value in enumerate(line[start : start + 32 // bits]))
            word = (word - subtracted) % 2**32
            row.append(word - 2**32 if word >= 2**31 else word)
        packed.append(row)
    return torch.tensor(packed, dtype=torch.int32).movedim(-1, axis).contiguous()


def settings(bits: int = 4, group_size: int = 32, sym: bool = False, **more: Any) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": False, "quant_method": "gptq"} | more


@dataclass
class Written:
    """A whole model: what its quantized matrices must be read as, by the key of the fused weight."""

    directory: Path
    matrices: dict[str, Matrix] = field(default_factory=dict)


def quantize(
    source: Path,
    directory: Path,
    *,
    split: bool = True,
    version: str = "gptq",
    formats: dict[str, tuple[int, int] | None] | None = None,
    group_size: int = 32,
    symmetric: bool = False,
    **more: Any,
) -> Written:
    """The checkpoint ``source`` with random codes in its linears; ``formats`` by the end of a module's name.

    A format of None leaves the linear in full precision.
    """
    written = Written(directory)
    directory.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in (WEIGHTS, CONFIG):
            (directory / path.name).write_bytes(path.read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    for number, (key, tensor) in enumerate(sorted(load_file(source / WEIGHTS).items())):
        module = key.removesuffix(".weight")
        named = any(module.endswith(end) for end in formats or {})
        if not key.endswith(".weight") or not (named or module.endswith("_proj")):
            tensors[key] = tensor.half() if key.endswith(".bias") else tensor
            continue
        rows, columns = tensor.shape
        chosen = next((form for end, form in (formats or {}).items() if module.endswith(end)), (4, group_size))
        names = [module]
        if split and module.endswith("gate_up_proj"):
            names = [module.replace("gate_up", part) for part in ("gate", "up")]
        if chosen is None:
            for index, name in enumerate(names):
                height = rows // len(names)
                tensors[f"{name}.weight"] = tensor[index * height :][:height].clone()
            continue
        matrix = Matrix.random(rows, columns, *chosen, symmetric, seed=number)
        written.matrices[key] = matrix
        for index, name in enumerate(names):
            height = rows // len(names)
            tensors |= matrix.rows(index * height, (index + 1) * height).tensors(name, version)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"] = settings(4, group_size, symmetric, checkpoint_format=version, **more)
    (directory / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return written
