"""The factorisation H = (U + I) D (U + I)^T, U strictly upper triangular and D diagonal, in the order of the sweep.

With it GPTQ needs no inverse: rounding column k to Q(w_k + sum_{i<k} (w_i - q_i) U_ik) leaves the error
sum_k D_k (rounding error of column k)^2 (Chee et al., QuIP, arXiv 2307.13304, theorem 1; equal to GPTQ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.quantization.cholesky import cholesky
from glmexport.quantization.order import ColumnOrder

#: Factor by which the damping is multiplied until the factorisation succeeds, and the limit at which that ends.
_DAMPING_STEP, _DAMPING_LIMIT = 10.0, 10.0
_SLAB = 1024
#: Largest size at which a factorisation that fails in fp32 is tried in fp64, whose two matrices then take at most 1
#: GiB; at K = 23,040 they would take 8.
DOUBLE_LIMIT = 8192


@dataclass(frozen=True)
class Factor:
    """The factorisation of a damped Hessian.

    ``hessian`` [K, K] and ``lower`` [K, K] (its Cholesky factor) are held in *reversed* sweep order: the Cholesky
    factor of the reversed matrix, read backwards, is the upper triangular factor that the sweep needs.
    """

    hessian: Tensor
    lower: Tensor
    #: The number that was added to each diagonal element, in sweep order [K].
    added: Tensor
    #: The damping used, as a fraction of the mean diagonal.
    damping: float
    #: Number of columns whose input was always zero.
    dead_columns: int
    #: Whether fp32 was not precise enough for this damping, and ``lower`` was computed in fp64.
    double: bool = False

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return U [stop, stop - start] and D [stop - start] of the sweep's columns ``start`` to ``stop``."""
        size = self.lower.shape[0]
        upper = self.lower[size - stop :, size - stop : size - start].flip(0, 1)
        diagonal = upper[start:].diagonal()
        return upper / diagonal, diagonal.square()

    def hessian_rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` of the damped Hessian in sweep order, [stop - start, K]."""
        size = self.hessian.shape[0]
        return self.hessian[size - stop : size - start].flip(0, 1)


def factorize(hessian: Tensor, order: ColumnOrder, damping: float, *, consume: bool = False) -> Factor | None:
    """Damp and factor ``hessian`` [K, K] fp32 (symmetric, positive semidefinite).

    A dead column (zero diagonal) gets the mean diagonal: it then neither receives nor spreads error, and its
    weights are rounded to nearest, so that text which does reach it still finds a weight there.

    Where fp32 fails, fp64 is tried before the damping is raised, so that the recipe's damping is kept.

    Args:
        hessian: the mean of x x^T.
        order: the order of the sweep.
        damping: the first try, as a fraction of the mean diagonal.
        consume: permute ``hessian`` itself instead of a copy; at K = 23,040 each K x K matrix takes 2 GiB.

    Returns:
        None if no damping up to ten times the mean diagonal makes the factorisation succeed.
    """
    size = len(hessian)
    permuted = hessian if consume else hessian.clone()
    _permute(permuted, order.columns.flip(0))
    diagonal = permuted.diagonal().clone()
    dead = diagonal <= 0
    alive = diagonal[~dead]
    mean = float(alive.mean()) if alive.numel() else 1.0
    fill = torch.where(dead, mean, 0.0)
    while damping <= _DAMPING_LIMIT:
        added = fill + damping * mean
        permuted.diagonal().copy_(diagonal + added)
        lower = cholesky(permuted)
        double = lower is None and size <= DOUBLE_LIMIT
        if double:
            wide = permuted.double()
            # In fp32 the sum may have lost a small addend.
            wide.diagonal().copy_(diagonal.double() + added.double())
            lower = cholesky(wide)
        if lower is not None:
            return Factor(permuted, lower.float(), added.flip(0), damping, int(dead.sum()), double)
        damping *= _DAMPING_STEP
    return None


def _permute(matrix: Tensor, order: Tensor) -> None:
    """Bring the rows and columns of a symmetric ``matrix`` [K, K] into ``order``, in place, a slab at a time.

    Columns are permuted, the matrix is transposed, and columns are permuted again: by symmetry that permutes both.
    """
    size = len(order)
    slabs = [slice(start, min(start + _SLAB, size)) for start in range(0, size, _SLAB)]
    for _ in range(2):
        for slab in slabs:
            matrix[slab] = matrix[slab].index_select(1, order)
        for index, rows in enumerate(slabs):
            for columns in slabs[: index + 1]:
                lower, upper = matrix[rows, columns].T.clone(), matrix[columns, rows].T.clone()
                matrix[rows, columns], matrix[columns, rows] = upper, lower
