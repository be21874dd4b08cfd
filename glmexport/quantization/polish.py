"""After the sweep: coordinate descent over the codes, and a closed-form refit of every scale.

The sweep never returns to a column; these rounds do. Both steps can only lower tr(E H E^T): coordinate descent
(Nair and Suggala, CDQuant, arXiv 2406.17542) moves one column at a time to its best code, and the refit is the
minimiser over one group's scale with everything else fixed, taken only where its rounding to fp16 is still lower.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from glmexport.formats.grid import stored_scale
from glmexport.foundation.recipe import Format
from glmexport.quantization.factor import Factor
from glmexport.quantization.order import ColumnOrder, strips


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
            codes, zero_point = rounded.codes[start:stop], rounded.zero_points[group]
            centred = codes.float() - zero_point
            limits = -zero_point, 2**form.bits - 1 - zero_point
            change = _descend(centred, projected[start:stop].clone(), inner, rounded.scales[group], limits)
            codes.copy_((centred + zero_point).to(torch.uint8))
            gradient = projected[start:stop] + inner @ change
            change -= centred * _refit(rounded.scales[group], centred, gradient, inner)
            rounded.error[start:stop] += change
            projected.addmm_(rows.T, change)


def _descend(centred: Tensor, gradient: Tensor, inner: Tensor, scale: Tensor, limits: tuple[Tensor, Tensor]) -> Tensor:
    """Each column of the group to the code that is best with all other columns as they are.

    Args:
        centred: [group, N] fp32, codes less their zero point; changed in place.
        gradient: [group, N], rows of H @ error; consumed.
        inner: [group, group], the group's own part of H.
        scale: [N].
        limits: of ``centred``, each [N].

    Returns:
        What it adds to the error, [group, N].
    """
    change = torch.empty_like(centred)
    inverse, curvature = 1 / scale, inner.diagonal().tolist()
    for start, stop in strips(len(centred)):
        for column in range(start, stop):
            code, slope = centred[column], gradient[column]
            if column > start:
                slope = torch.addmv(slope, change[start:column].T, inner[start:column, column])
            best = torch.addcmul(code, slope, inverse, value=1 / curvature[column]).round_().clamp_(*limits)
            torch.sub(code, best, out=change[column]).mul_(scale)
            code.copy_(best)
        gradient[stop:].addmm_(inner[stop:, start:stop], change[start:stop])
    return change


def _refit(scale: Tensor, centred: Tensor, gradient: Tensor, inner: Tensor) -> Tensor:
    """Moves ``scale`` [N] to the minimum for the group's codes where fp16 can hold an improvement; by how much, [N]."""
    slope = (centred * gradient).sum(0)
    curvature = (centred * (inner @ centred)).sum(0).clamp(min=1e-30)
    candidate = stored_scale(scale + slope / curvature)
    step = candidate - scale
    # The change of the objective is step^2 curvature - 2 step slope.
    better = step * (step * curvature - 2 * slope) < 0
    scale.copy_(torch.where(better, candidate, scale))
    return torch.where(better, step, 0.0)
