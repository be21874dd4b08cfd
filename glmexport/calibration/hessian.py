"""Hessian of a tap: the weighted mean of x x^T over the calibration inputs x that its linears read."""

from __future__ import annotations

from torch import Tensor, zeros


class Hessian:
    """Accumulates sum of weight * x x^T in fp32, one batch at a time.

    ``matrix`` is [K, K] fp32. ``tokens`` counts the inputs seen. Weights are meant to sum to one over all inputs,
    which keeps the accumulator in the range of a single x x^T however much text there is.
    """

    def __init__(self, size: int) -> None:
        self.matrix = zeros(size, size)
        self.tokens = 0

    def add(self, inputs: Tensor, weights: Tensor) -> None:
        """Add ``inputs`` [sequences, positions, K] fp32, with one weight [sequences] for all of its positions."""
        rows = (inputs * weights.sqrt()[:, None, None]).flatten(0, 1)
        self.matrix.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]
