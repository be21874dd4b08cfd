"""After the sweep: coordinate descent over the codes, and a closed-form refit of every scale.

The sweep never returns to a column; these rounds do. Both steps can only lower tr(E H E^T): coordinate descent
(Nair and Suggala, CDQuant, arXiv 2406.17542) moves one column at a time to its best code, and the refit is the
minimiser over one group's scale with everything else fixed, taken only where its rounding to fp16 is still lower.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from glmexport.quantization.factor import Factor
from glmexport.quantization.grid import decode, encode, stored_scale
from glmexport.quantization.order import ColumnOrder
from glmexport.recipe import Format


class Rounded(Protocol):
    """A matrix whose codes are chosen, in sweep order: [K, N]; per group [G, N]."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    error: Tensor


def polish(
    rounded: Rounded, factor: Factor, order: ColumnOrder, form: Format, *, rounds: int, projected: Tensor
) -> None:
    """Improve ``rounded`` in place; ``projected`` [K, N] is H @ error and is kept so."""
    for _ in range(rounds):
        for group, (start, stop) in enumerate(order.bounds):
            rows = factor.hessian_rows(start, stop)
            inner = rows[:, start:stop]
            before = rounded.error[start:stop].clone()
            _descend(rounded, projected[start:stop].clone(), inner, group, (start, stop), form.bits)
            change = rounded.error[start:stop] - before
            gradient = projected[start:stop] + inner @ change
            _refit(rounded, gradient, inner, group, (start, stop))
            projected.addmm_(rows.T, rounded.error[start:stop] - before)


def _descend(rounded: Rounded, gradient: Tensor, inner: Tensor, group: int, bounds: tuple[int, int], bits: int) -> None:
    """Each column of the group to the code that is best with all other columns as they are.

    Args:
        rounded: changed in place.
        gradient: [group, N], rows of H @ error; consumed.
        inner: [group, group], the group's own part of H.
        group: index into the scales.
        bounds: the group's columns.
        bits: of the codes.
    """
    start, stop = bounds
    scale, zero_point = rounded.scales[group], rounded.zero_points[group]
    curvature = inner.diagonal().tolist()
    for column in range(stop - start):
        codes, error = rounded.codes[start + column], rounded.error[start + column]
        value = decode(codes, scale, zero_point)
        best = encode(value + gradient[column] / curvature[column], scale, zero_point, bits)
        step = decode(best, scale, zero_point).sub_(value)
        codes.copy_(best.to(torch.uint8))
        error.sub_(step)
        gradient[column + 1 :].addr_(inner[column + 1 :, column], step, alpha=-1)


def _refit(rounded: Rounded, gradient: Tensor, inner: Tensor, group: int, bounds: tuple[int, int]) -> None:
    """The scale that minimises the error for the group's codes, where fp16 can hold an improvement."""
    start, stop = bounds
    centred = rounded.codes[start:stop].float() - rounded.zero_points[group]
    slope = (centred * gradient).sum(0)
    curvature = (centred * (inner @ centred)).sum(0).clamp(min=1e-30)
    scale = rounded.scales[group]
    candidate = stored_scale(scale + slope / curvature)
    step = candidate - scale
    # The change of the objective is step^2 curvature - 2 step slope.
    better = step * (step * curvature - 2 * slope) < 0
    rounded.scales[group] = torch.where(better, candidate, scale)
    rounded.error[start:stop] -= centred * torch.where(better, step, 0.0)
