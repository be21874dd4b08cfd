"""The arithmetic of one low-rank update, by rows, in fp32, as PEFT's merge_and_unload does it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from glmexport.checkpoint.header import TensorEntry
from glmexport.checkpoint.shards import Shards

if TYPE_CHECKING:
    import torch

#: Rows that are merged together. Every row is always computed in the same block of the matrix, whatever part of it is
#: asked for, because products of matrices of other heights add their terms up in another order.
_BLOCK_ROWS = 256
_SLAB_ROWS = 4 * _BLOCK_ROWS


@dataclass(frozen=True)
class LowRank:
    """The low-rank update W + scale * B A of one matrix.

    With a magnitude m, each output's weights are scaled to that length.

    LoRA, arXiv 2106.09685, section 4.1: W' = W + scale * B A.
    DoRA, arXiv 2402.09353, equation 5: W' = m * V / ||V|| with V = W + scale * B A; the norm is taken over what one
    output is made of: a row of a linear's [out, in], a column of an embedding's [vocabulary, hidden].

    A linear has A [rank, in] and B [out, rank]. An embedding, which PEFT stores as if it were a linear from the
    vocabulary, has A [rank, vocabulary] and B [hidden, rank], and its update is (B A)^T.
    """

    base: TensorEntry
    a: TensorEntry
    b: TensorEntry
    magnitude: TensorEntry | None
    scale: float
    embedding: bool
    #: Lengths of an embedding's columns, once measured: they alone need more than the rows that are asked for.
    _lengths: list[torch.Tensor] = field(default_factory=list, repr=False, compare=False)

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The adapter's tensors that the update consists of."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def rank(self) -> int:
        """The rank of B A."""
        return self.a.shape[0]

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes that ``entries`` must have for this base and the rank of A."""
        rows, columns = self.base.shape
        inputs, outputs = (rows, columns) if self.embedding else (columns, rows)
        return ((self.rank, inputs), (outputs, self.rank), (outputs,))[: len(self.entries)]

    def rows(self, shards: Shards, start: int, stop: int) -> torch.Tensor:
        """Return rows ``[start, stop)`` of the merged matrix; values that overflowed are left in it.

        Args:
            shards: What the base and the adapter are read from.
            start: First row, at least 0.
            stop: End of the rows, at most the base's height.

        Returns:
            fp32 of shape ``(stop - start, base.shape[1])``, contiguous; each row's bits depend on ``start`` and
            ``stop`` in no way.

        Raises:
            CheckpointError: as ``Shards.read``.
            MachineError: as ``Shards.read``.
        """
        first = start - start % _BLOCK_ROWS
        last = min(-(-stop // _BLOCK_ROWS) * _BLOCK_ROWS, self.base.shape[0])
        merged = self._sum(shards, first, last)
        if self.magnitude is not None and self.embedding:
            merged *= shards.read(self.magnitude) / self._column_lengths(shards)
        elif self.magnitude is not None:
            lengths = self._row_lengths(merged)
            merged *= (shards.read(self.magnitude, rows=slice(first, last)) / lengths)[:, None]
        return merged if (first, last) == (start, stop) else merged[start - first : stop - first].clone()

    def _sum(self, shards: Shards, first: int, last: int) -> torch.Tensor:
        """W + scale * B A, fp32, of whole blocks of rows."""
        total = shards.read(self.base, rows=slice(first, last))
        if self.embedding:
            left = shards.read(self.a, rows=slice(0, self.rank), columns=slice(first, last)).T.contiguous()
            right = shards.read(self.b).T.contiguous()
        else:
            left = shards.read(self.b, rows=slice(first, last))
            right = shards.read(self.a)
        for rows in _blocks(len(total)):
            total[rows] += (left[rows] @ right) * self.scale
        return total

    def _row_lengths(self, summed: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.cat([torch.linalg.vector_norm(summed[rows], dim=1) for rows in _blocks(len(summed))])

    def _column_lengths(self, shards: Shards) -> torch.Tensor:
        """One pass over the matrix, in slabs; kept, since every later read needs it."""
        import torch

        if not self._lengths:
            squares = torch.zeros(self.base.shape[1], dtype=torch.float64)
            for first in range(0, self.base.shape[0], _SLAB_ROWS):
                last = min(first + _SLAB_ROWS, self.base.shape[0])
                squares += self._sum(shards, first, last).double().square().sum(0)
            self._lengths.append(squares.sqrt().float())
        return self._lengths[0]


def _blocks(rows: int) -> list[slice]:
    return [slice(begin, begin + _BLOCK_ROWS) for begin in range(0, rows, _BLOCK_ROWS)] or [slice(0, 0)]
