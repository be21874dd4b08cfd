"""Matrices that a file holds in another shape or precision than a weight's: one of a stack, or scaled fp8 numbers.

fp8 checkpoints hold a linear as ``weight`` F8_E4M3 [N, K] and factors: the weight is the product of the two.
transformers (FineGrainedFP8Config) writes ``weight_scale_inv`` [ceil(N / n), ceil(K / k)], one factor a block of
n x k weights; compressed-tensors ``weight_scale`` of a row [N, 1], of the matrix [1], or of blocks likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.header import WEIGHT_DTYPES, TensorEntry
from glmexport.checkpoint.shards import Shards
from glmexport.foundation.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_FACTORS = ".weight_scale_inv"
FP8 = "F8_E4M3"


@dataclass(frozen=True)
class StackedMatrix:
    """Matrix ``index`` of the tensor ``stack`` [count, rows, columns]."""

    stack: TensorEntry
    index: int

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The stored tensors that it is part of."""
        return (self.stack,)

    @property
    def dtype(self) -> str:
        """The dtype as stored."""
        return self.stack.dtype

    @property
    def rows(self) -> int:
        """The rows of the matrix."""
        return self.stack.shape[1]

    @property
    def columns(self) -> int:
        """The columns of the matrix."""
        return self.stack.shape[2]

    @property
    def bytes(self) -> int:
        """The bytes of this matrix in the file."""
        return self.stack.bytes // self.stack.shape[0]

    def read(self, shards: Shards, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) fp32; raises as ``Shards.read`` does."""
        return shards.read(self.stack, None, slice(self.index, self.index + 1), slice(start, stop))[0]


@dataclass(frozen=True)
class ScaledMatrix:
    """A matrix of fp8 numbers with a factor for every block of ``block`` rows and columns.

    A block of 1 x K is a row, and one of N x K the whole matrix. The value is number times factor, in fp32.
    """

    weight: TensorEntry
    factors: TensorEntry
    block: tuple[int, int]
    #: ``block``, ``row`` or ``matrix``: the numbers that a factor is for.
    shared_by: str = "block"

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The stored tensors that it consists of."""
        return (self.weight, self.factors)

    @property
    def label(self) -> str:
        """The short name: ``fp8-128x128``, ``fp8-row`` or ``fp8-matrix``."""
        return f"fp8-{self.block[0]}x{self.block[1]}" if self.shared_by == "block" else f"fp8-{self.shared_by}"

    @property
    def dtype(self) -> str:
        """The dtype as stored."""
        return self.weight.dtype

    @property
    def rows(self) -> int:
        """The rows of the matrix."""
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        """The columns of the matrix."""
        return self.weight.shape[1]

    @property
    def bytes(self) -> int:
        """The bytes of both tensors in their files."""
        return sum(entry.bytes for entry in self.entries)

    def read(self, shards: Shards, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) fp32; raises as ``Shards.read`` does."""
        values = shards.read(self.weight, None, slice(start, stop), accepted=(FP8,))
        if self.shared_by == "matrix":
            return values.mul_(shards.read(self.factors).reshape(()))
        if self.shared_by == "row":
            return values.mul_(shards.read(self.factors, None, slice(start, stop)).reshape(-1, 1))
        # A block may be larger than the matrix, and what is spread over it must not.
        height, width = (max(1, min(pair)) for pair in zip(self.block, self.weight.shape, strict=True))
        first, last = start // height, -(-stop // height)
        factors = shards.read(self.factors, None, slice(first, last)).repeat_interleave(height, 0)
        factors = factors[start - first * height :][: stop - start]
        return values.mul_(factors.repeat_interleave(width, 1)[:, : self.columns])


def scaled_matrix(weight: TensorEntry, factors: TensorEntry, block: tuple[int, int] | None) -> ScaledMatrix | None:
    """Return the matrix of fp8 ``weight``; None if the shape of ``factors`` fits neither rows, matrix nor ``block``."""
    if len(weight.shape) != 2 or weight.dtype != FP8 or factors.dtype not in WEIGHT_DTYPES:
        return None
    rows, columns = weight.shape
    if block is not None and factors.shape == (-(-rows // block[0]), -(-columns // block[1])):
        return ScaledMatrix(weight, factors, block)
    if factors.shape in ((rows,), (rows, 1)):
        return ScaledMatrix(weight, factors, (1, columns), "row")
    return ScaledMatrix(weight, factors, (rows, columns), "matrix") if factors.elements == 1 else None


def block_size(table: ConfigReader) -> tuple[int, int]:
    """Return the rows and columns that share a factor, as the ``table`` of an fp8 checkpoint has them.

    Raises:
        CheckpointError: fp8 with other than a factor a block.
    """
    size = table.integers("weight_block_size", minimum=1)
    if len(size) != 2:
        raise CheckpointError(
            f"{table.where}: weight_block_size is {list(size)}, and accepted are two integers.",
            next_step="Correct the file, or use the bf16 checkpoint of this model.",
        )
    return size[0], size[1]


def block_scaled(tensors: Mapping[str, TensorEntry], block: tuple[int, int]) -> dict[str, ScaledMatrix]:
    """Return the matrices that have factors, by the name of their weight.

    Raises:
        CheckpointError: factors without their matrix, or of another shape than it needs; an fp8 matrix without any.
    """
    found = {}
    for key, factors in tensors.items():
        if key.endswith(_FACTORS):
            weight = tensors.get(f"{key.removesuffix(_FACTORS)}.weight")
            needed = None if weight is None else tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=False))
            if weight is None or len(weight.shape) != 2 or weight.dtype != FP8 or factors.shape != needed:
                shown = "absent" if weight is None else f"{weight.dtype} {list(weight.shape)}"
                raise CheckpointError(
                    f"{factors.path}: {key} has shape {list(factors.shape)}, and its matrix is {shown}; blocks are of "
                    f"{block[0]} x {block[1]}.",
                    next_step="Download the checkpoint again, or use the bf16 one.",
                )
            found[weight.name] = ScaledMatrix(weight, factors, block)
    bare = next((key for key, entry in tensors.items() if entry.dtype == FP8 and key not in found), None)
    if bare is not None:
        raise CheckpointError(
            f"{tensors[bare].path}: {bare} is fp8, and there is no {bare}_scale_inv.",
            next_step="Download the checkpoint again, or use the bf16 one.",
        )
    return found
