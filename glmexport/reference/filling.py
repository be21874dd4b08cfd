"""The places of a transformers module's tensors in a checkpoint, and experts that are read one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from glmexport.architecture.description import DecoderLayer

#: Bytes of one block's experts that stay in memory once they were read; the others are read again when they are chosen.
KEPT_BYTES = 1 << 28

#: Names of transformers' stacked experts [experts, rows, columns] in their module, and of one expert's matrix in ours.
EXPERTS, ROUTER = "mlp.experts", "mlp.gate"
MATRICES = ("gate_up_proj", "down_proj")


def stacked_halves(layer: DecoderLayer) -> dict[str, tuple[str, int]]:
    """Return the key of a matrix, and which half of it, by the name of the tensor in transformers' module."""
    found = {}
    for key, parts in layer.mlp.stacks.items():
        for half, part in enumerate(parts):
            found[part.removeprefix(f"{layer.prefix}.")] = (key, half)
    return found


class StreamedMatrices:
    """A stack of matrices in the place of transformers' experts; each is read when it is indexed."""

    def __init__(self, read: Callable[[int], Tensor], kept_bytes: int) -> None:
        self._read = read
        self._left = kept_bytes
        self._kept: dict[int, Tensor] = {}

    def __getitem__(self, expert: Any) -> Tensor:
        """The matrix [rows, columns] fp32 of one expert."""
        index = int(expert)
        if index in self._kept:
            return self._kept[index]
        matrix = self._read(index)
        size = matrix.numel() * matrix.element_size()
        if size <= self._left:
            self._kept[index] = matrix
            self._left -= size
        return matrix


def stream_experts(module: nn.Module, read: Callable[[int, str], Tensor], kept_bytes: int = KEPT_BYTES) -> None:
    """Let the experts of a decoder layer be read one at a time.

    Args:
        module: transformers' decoder layer; its eager experts index their stacks by one expert at a time.
        read: matrix ``MATRICES[i]`` of an expert, fp32.
        kept_bytes: how much may stay in memory.
    """
    experts = module.get_submodule(EXPERTS)
    for name in MATRICES:
        del experts._parameters[name]

        def one(index: int, name: str = name) -> Tensor:
            return read(index, name)

        object.__setattr__(experts, name, StreamedMatrices(one, kept_bytes // len(MATRICES)))
