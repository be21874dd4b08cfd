"""The asymmetric target: a matrix is fitted to the output that it has in the *original* model.

Everything before a matrix is already quantized, so its input x differs from the original's x_o. Fitted to its own
output W x it would hand that difference on; fitted to y = W x_o (and, where its output is added to the residual
stream, to the original's stream) it takes back what it can. The least-squares answer is W + C H^-1, with
d = y - W x, C = E[d x^T] and H = E[x x^T] (QEP, arXiv 2504.09629; Qronos, arXiv 2505.11695). On finite text part of
C is chance: the correction is shrunk by the factor in 0 .. 1 that fits text which neither C nor H has seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.quantization.cholesky import cholesky_solve
from glmexport.quantization.factor import Factor
from glmexport.quantization.order import ColumnOrder


@dataclass(frozen=True)
class Sample:
    """Held-out text at one tap: ``inputs`` [S, K] of the quantized stream, ``weights`` [S], fp32."""

    inputs: Tensor
    weights: Tensor

    def errors(self, residual: Tensor) -> Tensor:
        """Return the weighted mean square [N] of ``residual`` [S, N]."""
        return self.weights @ residual.square()


@dataclass(frozen=True)
class Goal:
    """The goal d, the original's output less that of the unquantized matrix on the quantized stream, as moments.

    ``cross`` [M, K] is E[d x^T] and ``held`` [S, M] is d on the held-out text, where M = N; or, for matrices that
    share their input and write to no stream, both are of the inputs' difference x_o - x (``of_inputs``; M = K), of
    which every matrix of the tap makes its own d.
    """

    cross: Tensor
    held: Tensor
    of_inputs: bool

    def solved(self, factor: Factor, order: ColumnOrder, sample: Sample) -> Correction:
        """Return what the goal adds to the rows of matrices whose Hessian has that factor, in the order of the sweep.

        Where matrices share the goal, H^-1 is applied once for all of their rows.
        """
        cross = self.cross
        if self.of_inputs:
            cross = _divided(cross, factor, order)
        predicted = sample.inputs @ cross if self.of_inputs else None
        return Correction(cross, self.held, factor, order, sample, predicted)


@dataclass(frozen=True)
class Correction:
    """The correction C H^-1 of a matrix, and what held-out text says of it; it is made a few rows at a time.

    ``cross`` is that of the goal; of a goal of inputs H^-1 ``cross``^T [K, K], its rows in the order of the sweep, and
    ``predicted`` [S, K] is what it adds to the held-out inputs.
    """

    cross: Tensor
    held: Tensor
    factor: Factor
    order: ColumnOrder
    #: Held-out text whose columns are in the order of the sweep.
    sample: Sample
    predicted: Tensor | None

    def rows(self, weight: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the correction of the rows ``weight`` [n, K] of the matrix, which begin at row ``start``.

        Returns:
            The correction [K, n] in the order of the sweep, what it adds to the output on the held-out text [S, n], and
            d [S, n], what is wanted there beyond what the matrix gives.
        """
        if self.predicted is not None:
            return self.cross @ weight.T, self.predicted @ weight.T, self.held @ weight.T
        stop = start + weight.shape[0]
        correction = _divided(self.cross[start:stop], self.factor, self.order)
        return correction, self.sample.inputs @ correction, self.held[:, start:stop]


def _divided(cross: Tensor, factor: Factor, order: ColumnOrder) -> Tensor:
    """Return H^-1 ``cross``^T [K, M] in the order of the sweep; ``cross`` [M, K] is in stored order, H damped."""
    return cholesky_solve(cross.T[order.columns].flip(0), factor.lower).flip(0)


def shrinkage(difference: Tensor, predicted: Tensor, weights: Tensor) -> Tensor:
    """Return the factor a [N] in 0 .. 1 that minimises sum_s w_s (d_s - a p_s)^2, for each output on its own.

    It is 0, the matrix' own output, where the prediction does not help on the held-out text.

    Args:
        difference: d [S, N] fp32.
        predicted: p [S, N] fp32, what the correction C H^-1 adds to the output.
        weights: [S].
    """
    along = weights @ (difference * predicted)
    return (along / (weights @ predicted.square()).clamp(min=1e-30)).clamp(0, 1)


def stream_difference(branch: Tensor, ours: Tensor, theirs: Tensor, gain: Tensor | None, epsilon: float) -> Tensor:
    """Return what a branch's last matrix would have to add to its output for the residual stream to be the original's.

    Without a norm after the matrix that is ``theirs - ours``. With one, the sum is
    ours + y / rms(y) * gain, so the difference is brought before the norm with the rms of the original's y;
    channels with almost no gain, where it would explode, are left alone.

    Args:
        branch: [..., N] fp32, y in the original.
        ours: [..., N], the quantized model's stream that the branch adds to.
        theirs: [..., N], the original's.
        gain: [N], that of the RMSNorm between matrix and stream, or None.
        epsilon: that of the norm.
    """
    difference = theirs - ours
    if gain is None:
        return difference
    rms = (branch.square().mean(-1, keepdim=True) + epsilon).sqrt()
    audible = gain.abs() > 0.01 * gain.abs().mean()
    return difference * torch.where(audible, 1 / torch.where(audible, gain, 1.0), 0.0) * rms
