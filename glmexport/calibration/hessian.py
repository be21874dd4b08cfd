"""Second moments of what linears read: the Hessian of a tap, and its cross moment with a difference."""

from __future__ import annotations

from torch import Tensor, zeros


class Hessian:
    """Accumulates sum of weight * x x^T in fp32, one batch at a time.

    ``matrix`` is [K, K] fp32. Weights are meant to sum to one over all inputs, which keeps the accumulator in the
    range of a single x x^T however much text there is.
    """

    def __init__(self, size: int) -> None:
        self.matrix = zeros(size, size)

    def add(self, inputs: Tensor, weights: Tensor) -> None:
        """Add ``inputs`` [sequences, positions, K] fp32, with one weight [sequences] for all of its positions."""
        rows = (inputs * weights.sqrt()[:, None, None]).flatten(0, 1)
        self.matrix.addmm_(rows.T, rows)


class CrossMoment:
    """Accumulates sum of weight * d x^T in fp32: ``matrix`` [M, K] for differences d [M] and inputs x [K]."""

    def __init__(self, differences: int, size: int) -> None:
        self.matrix = zeros(differences, size)

    def add(self, differences: Tensor, inputs: Tensor, weights: Tensor) -> None:
        """Add [sequences, positions, M] and [sequences, positions, K] fp32, weighted as in ``Hessian``."""
        weighted = (differences * weights[:, None, None]).flatten(0, 1)
        self.matrix.addmm_(weighted.T, inputs.flatten(0, 1))
