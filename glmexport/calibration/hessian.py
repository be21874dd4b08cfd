"""Second moments of the inputs of linears: the Hessian of a tap, and its cross moment with a difference.

Rows are given times the square root of their weight. Weights are meant to sum to one over all of them, which keeps
the accumulators in the range of a single outer product however much text there is.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of a Hessian that are added to together, up to the diagonal: the other half follows by symmetry.
_SLAB = 192


def hessian_operations(rows: float, size: int) -> float:
    """Return the operations of adding so many ``rows`` to a ``Hessian`` of that ``size``; a multiply-add is two."""
    stops = [min(start + _SLAB, size) for start in range(0, size, _SLAB)]
    return 2.0 * rows * sum((stop - start) * stop for start, stop in zip(range(0, size, _SLAB), stops, strict=True))


class SecondMoment:
    """An accumulator of the sum of d x^T, one batch at a time; ``matrix`` is [M, K] fp32."""

    def __init__(self, rows: int, columns: int, device: torch.device | None = None) -> None:
        self.matrix = torch.zeros(rows, columns, device=device)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add ``left`` [n, M] and ``right`` [n, K], fp32, row by row."""
        self.matrix.addmm_(left.T, right)


class Hessian:
    """An accumulator of the sum of x x^T, one batch at a time, at little more than half a ``SecondMoment``'s cost."""

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        self._lower = torch.zeros(size, size, device=device)
        self._slabs = [(start, min(start + _SLAB, size)) for start in range(0, size, _SLAB)]

    def add(self, inputs: Tensor) -> None:
        """Add ``inputs`` [n, K], fp32, row by row."""
        for start, stop in self._slabs:
            self._lower[start:stop, :stop].addmm_(inputs[:, start:stop].T, inputs[:, :stop])

    def matrix(self) -> Tensor:
        """Return the sum so far, [K, K] fp32, symmetric to the last bit; its storage is that of the accumulator."""
        for start, stop in self._slabs:
            slab = self._lower[start:stop, :stop]
            slab[:, start:] = slab[:, start:].tril() + slab[:, start:].tril(-1).T
            self._lower[:start, start:stop] = slab[:, :start].T
        return self._lower
