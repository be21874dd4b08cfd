"""The scale and zero point of one group of weights: w ~ (q - zero_point) * scale, with q in 0 .. 2^bits - 1.

Every function works on all rows of a matrix at once, with the inputs of one group along the first axis:
``weights`` is [group, rows]. Scales are returned as fp32 values that fp16, the type they are stored in, holds
exactly: rounding them after the codes are chosen would move every weight of the group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmexport.foundation.recipe import Format

#: Shrink factors of the min-max range that the search tries. Clipping the ends costs a few weights and makes
#: the step finer for all the others.
SHRINK = tuple(1.0 - 0.04 * step for step in range(11))
_FP16_SMALLEST, _FP16_LARGEST = 2.0**-24, 65504.0


def minmax_grid(weights: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Return the grid that just covers the range of the group.

    Args:
        weights: [group, rows] fp32.
        form: bits and symmetry.

    Returns:
        scale [rows] fp32 (held exactly by fp16; negative where a symmetric group's largest weight is positive,
        so that it falls on the code that has no counterpart), zero_point [rows] fp32 with integral values.
    """
    levels = 2**form.bits - 1
    middle = float(2 ** (form.bits - 1))
    low, high = weights.amin(0), weights.amax(0)
    if form.symmetric:
        extreme = torch.where(low.abs() >= high.abs(), low, high)
        return stored_scale(-extreme / middle), torch.full_like(extreme, middle)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = stored_scale((high - low) / levels)
    return scale, (-low / scale).round().clamp(0, levels)


def stored_scale(scale: Tensor) -> Tensor:
    """Return ``scale`` as fp16 holds it: same sign, magnitude clamped to fp16's range; 1 where it is exactly zero."""
    magnitude = scale.abs().clamp(_FP16_SMALLEST, _FP16_LARGEST)
    return torch.where(scale == 0, 1.0, torch.copysign(magnitude, scale)).half().float()


def encode(weights: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the nearest codes of ``weights`` [..., rows], fp32 with integral values in 0 .. 2^bits - 1."""
    return (weights / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return (codes - zero_point) * scale, fp32."""
    return (codes - zero_point) * scale


def searched_grid(weights: Tensor, importance: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Return the grid with the least importance-weighted squared error among shrunk ranges and shifted zero points.

    Then the scale is refitted in closed form on the codes of the best candidate: for fixed c = q - zero_point the
    minimiser of sum_j h_j (w_j - s c_j)^2 is s = sum h w c / sum h c^2.

    Args:
        weights: [group, rows] fp32.
        importance: [group] fp32, at least 0; the diagonal D of H = (U + I) D (U + I)^T, which is what an error in
            that column still costs after the later columns have compensated for it.
        form: bits and symmetry.

    Returns:
        scale and zero_point as ``minmax_grid``; never a larger error than its grid has.
    """
    full, zero = minmax_grid(weights, form)
    best = _Best(weights, importance, form, full, zero)
    for shrink in SHRINK[1:]:
        best.consider(stored_scale(full * shrink), zero)
    if form.symmetric:
        best.consider(-best.scale, zero)
    else:
        centre = best.zero_point
        for shift in (-1.0, 1.0):
            best.consider(best.scale, (centre + shift).clamp(0, 2**form.bits - 1))
    centred = encode(weights, best.scale, best.zero_point, form.bits).sub_(best.zero_point)
    weighted = centred * importance[:, None]
    refit = (weighted * weights).sum(0) / weighted.mul_(centred).sum(0).clamp_(min=1e-30)
    best.consider(torch.where(refit != 0, stored_scale(refit), best.scale), best.zero_point)
    return best.scale, best.zero_point


class _Best:
    """The best grid so far of every row."""

    def __init__(self, weights: Tensor, importance: Tensor, form: Format, scale: Tensor, zero_point: Tensor) -> None:
        self.weights, self.importance, self.bits = weights, importance, form.bits
        self.scale, self.zero_point = scale, zero_point
        self._scratch = torch.empty_like(weights)
        self.error = _error(weights, importance, scale, zero_point, form.bits, self._scratch)

    def consider(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take the candidate where it is better."""
        error = _error(self.weights, self.importance, scale, zero_point, self.bits, self._scratch)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero_point = torch.where(better, zero_point, self.zero_point)


def _error(
    weights: Tensor, importance: Tensor, scale: Tensor, zero_point: Tensor, bits: int, scratch: Tensor
) -> Tensor:
    # decode(encode(weights)) without adding the zero point and taking it away again, in memory that stays in the cache.
    centred = torch.div(weights, scale, out=scratch).round_().clamp_(-zero_point, 2**bits - 1 - zero_point)
    return importance @ centred.mul_(scale).sub_(weights).square_()
