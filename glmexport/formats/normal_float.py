"""The NF4 codec: 4-bit codes that name one of sixteen unevenly spaced levels, as ONNX Runtime's MatMulBnb4 reads it.

The levels are quantiles of a normal distribution (QLoRA, arXiv 2305.14314), 1 the largest, times the scale of a group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from glmexport.formats.codec import Numbers
from glmexport.formats.grid import SHRINK, stored_scale
from glmexport.foundation.recipe import Format

#: The levels as bitsandbytes defines them, which the operator's kernels have as constants.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class NormalFloatGrid:
    """The sixteen levels times a scale, which has a sign: the range is closed at both ends, but not symmetric."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        self.zero_point = torch.zeros_like(scale)
        self._levels = torch.tensor(LEVELS, device=scale.device)
        self._between = (self._levels[1:] + self._levels[:-1]) / 2

    def nearest_(self, scaled: Tensor) -> Tensor:
        """Replace ``scaled`` by the nearest levels, in place."""
        return scaled.copy_(self._levels[torch.bucketize(scaled, self._between)])

    def levels(self, codes: Tensor) -> Tensor:
        """Return the levels that the codes name."""
        return self._levels[codes.long()]

    def codes(self, levels: Tensor) -> Tensor:
        """Return the codes of the levels."""
        return torch.bucketize(levels, self._between).to(torch.uint8)

    def encode(self, weights: Tensor) -> Tensor:
        """Return the nearest codes, uint8."""
        return self.codes(weights / self.scale)

    def decode(self, codes: Tensor) -> Tensor:
        """Return level times scale, fp32."""
        return self.levels(codes) * self.scale


class NormalFloatCodec:
    """NF4 with an fp16 scale a group and no zero points; rows consist of whole groups."""

    parts = ("codes", "scales")
    reach = 1.0
    step = 2 / 15
    searched = True
    looked_up = False

    def __init__(self, form: Format) -> None:
        self.form = form

    def holds(self, columns: int) -> bool:
        """Return whether ``columns`` are whole groups: the operator counts groups through the rows."""
        return columns % self.form.group_size == 0

    def stored_bits(self, shape: tuple[int, ...]) -> int:
        """Return the bits of codes and fp16 scales."""
        rows, columns = shape
        groups = -(-columns // self.form.group_size)
        return rows * groups * (4 * self.form.group_size + 16)

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the packed tensors; two codes share a byte."""
        return {"codes": (rows, columns // 2), "scales": (rows, columns // self.form.group_size)}

    def fit(self, weights: Tensor, importance: Tensor | None) -> NormalFloatGrid:
        """Return the grid that covers the range, or the best of shrunk ones of both signs, its scale then refitted.

        The refit is in closed form on the codes of the best: s = sum h w l / sum h l^2 for levels l.
        """
        lowest, highest = weights.amin(0), weights.amax(0)
        # -1 and 1 are both levels: the sign decides which half has the seven finer steps.
        extreme = torch.maximum(lowest.abs(), highest.abs())
        best = NormalFloatGrid(stored_scale(extreme))
        if importance is None:
            return best
        error = _error(best, weights, importance)
        for shrink in SHRINK:
            for sign in (1.0, -1.0):
                candidate = NormalFloatGrid(stored_scale(extreme * shrink * sign))
                best, error = _better(best, error, candidate, weights, importance)
        levels = best.levels(best.encode(weights))
        weighted = levels * importance[:, None]
        refit = (weighted * weights).sum(0) / (weighted * levels).sum(0).clamp(min=1e-30)
        refitted = NormalFloatGrid(torch.where(refit != 0, stored_scale(refit), best.scale))
        return _better(best, error, refitted, weights, importance)[0]

    def grid(self, scale: Tensor, zero_point: Tensor) -> NormalFloatGrid:
        """Return the grid of that scale; there is no zero point."""
        return NormalFloatGrid(scale)

    def numbers(self, codes: Tensor, scales: Tensor, zero_points: Tensor) -> Numbers:
        """Return codes and fp16 scales."""
        return Numbers(codes, scales.half(), None)

    def dequantize(self, numbers: Numbers) -> Tensor:
        """Return level times scale, fp32."""
        levels = torch.tensor(LEVELS, device=numbers.codes.device)
        return levels[numbers.codes.long()] * numbers.scales.float().repeat_interleave(self.form.group_size, 1)

    def pack(self, numbers: Numbers) -> dict[str, Tensor]:
        """Return codes [N, K / 2] uint8, the first of two in the high half, and scales [N, G] fp16."""
        return {"codes": (numbers.codes[:, 0::2] << 4) | numbers.codes[:, 1::2], "scales": numbers.scales}

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Numbers:
        """Return the numbers."""
        codes = packed["codes"]
        return Numbers(torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1), packed["scales"], None)


def _error(grid: NormalFloatGrid, weights: Tensor, importance: Tensor) -> Tensor:
    return importance @ grid.decode(grid.encode(weights)).sub_(weights).square_()


def _better(
    best: NormalFloatGrid, error: Tensor, other: NormalFloatGrid, weights: Tensor, importance: Tensor
) -> tuple[NormalFloatGrid, Tensor]:
    """Return the better of two grids for every row, and its error [rows]."""
    found = _error(other, weights, importance)
    better = found < error
    return NormalFloatGrid(torch.where(better, other.scale, best.scale)), torch.where(better, found, error)
