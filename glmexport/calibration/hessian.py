"""Second moments of the inputs of linears: the Hessian of a tap, and its cross moment with a difference.

Rows are given times the square root of their weight. Weights are meant to sum to one over all of them, which keeps
the accumulators in the range of a single outer product however much text there is. A coarse accumulator rounds what it
is given to bf16 and multiplies that without error, which some processors do at twice the speed.

An accumulator is cut into slabs of rows that are added to one by one, of which one process may keep every ``size``-th
from the ``rank``-th on and leave the others to other processes: a slab is the same to the last bit whoever keeps it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmexport.reference.coarse import Rounding, exact_products

#: Rows of an accumulator that are added to together; of a Hessian up to the diagonal: the other half follows by
#: symmetry.
_SLAB = 192


def hessian_operations(rows: float, size: int) -> float:
    """Return the operations of adding so many ``rows`` to a ``Hessian`` of that ``size``; a multiply-add is two."""
    stops = [min(start + _SLAB, size) for start in range(0, size, _SLAB)]
    return 2.0 * rows * sum((stop - start) * stop for start, stop in zip(range(0, size, _SLAB), stops, strict=True))


class SecondMoment:
    """An accumulator of the sum of d x^T, one batch at a time; ``matrix`` is [M, K] fp32."""

    def __init__(
        self,
        rows: int,
        columns: int,
        device: torch.device | None = None,
        *,
        coarse: bool = False,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self._round_left, self._round_right = Rounding(coarse=coarse), Rounding(coarse=coarse)
        # Memory that is never written is never taken: slabs of others cost nothing.
        self.matrix = torch.zeros(rows, columns, device=device)
        #: The first and last row of every slab, and those of the slabs that are kept here.
        self.slabs = [(start, min(start + _SLAB, rows)) for start in range(0, rows, _SLAB)]
        self.kept = self.slabs[rank::size]

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add ``left`` [n, M] and ``right`` [n, K], fp32, row by row, to what is kept here."""
        left, right = self._round_left(left), self._round_right(right)
        with exact_products(coarse=self._round_left.coarse):
            for start, stop in self.kept:
                self.matrix[start:stop].addmm_(left[:, start:stop].T, right)

    def subtract(self, weight: Tensor, moment: Tensor) -> None:
        """Take ``weight`` [M, L] times ``moment`` [L, K] off what is kept here."""
        for start, stop in self.kept:
            self.matrix[start:stop].addmm_(weight[start:stop], moment, alpha=-1)

    def slab(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` as they are stored, which may be written to."""
        return self.matrix[start:stop]


class Hessian:
    """An accumulator of the sum of x x^T, one batch at a time, at little more than half a ``SecondMoment``'s cost."""

    def __init__(
        self, columns: int, device: torch.device | None = None, *, coarse: bool = False, rank: int = 0, size: int = 1
    ) -> None:
        self._round = Rounding(coarse=coarse)
        self._lower = torch.zeros(columns, columns, device=device)
        #: The first and last row of every slab, and those of the slabs that are kept here.
        self.slabs = [(start, min(start + _SLAB, columns)) for start in range(0, columns, _SLAB)]
        self.kept = self.slabs[rank::size]

    def add(self, inputs: Tensor) -> None:
        """Add ``inputs`` [n, K], fp32, row by row, to what is kept here."""
        inputs = self._round(inputs)
        with exact_products(coarse=self._round.coarse):
            for start, stop in self.kept:
                self._lower[start:stop, :stop].addmm_(inputs[:, start:stop].T, inputs[:, :stop])

    def slab(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` as they are stored, up to the diagonal; they may be written to."""
        return self._lower[start:stop, :stop]

    def matrix(self) -> Tensor:
        """Return the sum so far, [K, K] fp32, symmetric to the last bit; its storage is that of the accumulator.

        Slabs of others have to be written first.
        """
        for start, stop in self.slabs:
            slab = self._lower[start:stop, :stop]
            slab[:, start:] = slab[:, start:].tril() + slab[:, start:].tril(-1).T
            self._lower[:start, start:stop] = slab[:, :start].T
        return self._lower
