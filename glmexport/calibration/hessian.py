"""Second moments of what linears read: the Hessian of a tap, and its cross moment with a difference."""

from __future__ import annotations

from torch import Tensor, zeros


class SecondMoment:
    """Accumulates sum of d x^T in fp32, one batch at a time; with d = x it is the Hessian of x.

    ``matrix`` is [M, K] fp32. Rows are given times the square root of their weight. Weights are meant to sum to one
    over all of them, which keeps the accumulator in the range of a single d x^T however much text there is.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.matrix = zeros(rows, columns)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add ``left`` [n, M] and ``right`` [n, K], fp32, row by row."""
        self.matrix.addmm_(left.T, right)
