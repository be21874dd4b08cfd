"""The polish after the sweep: coordinate descent over the codes, and a closed-form refit of every scale.

The sweep never returns to a column; these rounds do. Both steps can only lower tr(E H E^T): coordinate descent
(Nair and Suggala, CDQuant, arXiv 2406.17542) moves one column at a time to its best code, and the refit is the
minimiser over one group's scale with everything else fixed, taken only where its rounding to fp16 is still lower.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from glmexport.formats.codec import Codec, Grid
from glmexport.formats.grid import stored_scale
from glmexport.quantization.factor import Factor
from glmexport.quantization.order import ColumnOrder, strips


class Rounded(Protocol):
    """A matrix whose codes are chosen, in sweep order: [K, N]; per group [G, N]."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    error: Tensor


def polish(rounded: Rounded, factor: Factor, order: ColumnOrder, codec: Codec, *, rounds: int) -> None:
    """Improve ``rounded`` in place.

    Each group takes its own rows of H @ error when its turn comes. To keep all rows up to date instead would cost the
    same product for each group, and one more for H @ error before the first.
    """
    for _ in range(rounds):
        for group, (start, stop) in enumerate(order.bounds):
            rows = factor.hessian_rows(start, stop)
            inner = rows[:, start:stop]
            codes = rounded.codes[start:stop]
            grid = codec.grid(rounded.scales[group], rounded.zero_points[group])
            levels = grid.levels(codes)
            gradient = rows @ rounded.error
            change = _descend(levels, gradient.clone(), inner, grid)
            codes.copy_(grid.codes(levels))
            gradient.addmm_(inner, change)
            change -= levels * _refit(rounded.scales[group], levels, gradient, inner)
            rounded.error[start:stop] += change


def _descend(levels: Tensor, gradient: Tensor, inner: Tensor, grid: Grid) -> Tensor:
    """Move each column of the group to the code that is best with all other columns as they are.

    Args:
        levels: [group, N] fp32, what the codes name; changed in place.
        gradient: [group, N], rows of H @ error; consumed.
        inner: [group, group], the group's own part of H.
        grid: of the group.

    Returns:
        What it adds to the error, [group, N].
    """
    change = torch.empty_like(levels)
    scale, inverse, curvature = grid.scale, 1 / grid.scale, inner.diagonal().tolist()
    for start, stop in strips(len(levels)):
        for column in range(start, stop):
            level, slope = levels[column], gradient[column]
            best = grid.nearest_(torch.addcmul(level, slope, inverse, value=1 / curvature[column]))
            torch.sub(level, best, out=change[column]).mul_(scale)
            level.copy_(best)
            gradient[column + 1 : stop].addr_(inner[column, column + 1 : stop], change[column])
        gradient[stop:].addmm_(inner[stop:, start:stop], change[start:stop])
    return change


def _refit(scale: Tensor, levels: Tensor, gradient: Tensor, inner: Tensor) -> Tensor:
    """Move ``scale`` [N] to the minimum for the group's codes where fp16 can hold it; return by how much, [N]."""
    slope = (levels * gradient).sum(0)
    curvature = (levels * (inner @ levels)).sum(0).clamp(min=1e-30)
    candidate = stored_scale(scale + slope / curvature)
    step = candidate - scale
    # The change of the objective is step^2 curvature - 2 step slope.
    better = step * (step * curvature - 2 * slope) < 0
    scale.copy_(torch.where(better, candidate, scale))
    return torch.where(better, step, 0.0)
