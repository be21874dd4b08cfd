"""The affine codec: w ~ (q - zero_point) * scale, with q in 0 .. 2^bits - 1, as ONNX Runtime's MatMulNBits reads it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from glmexport.formats.codec import Numbers
from glmexport.formats.grid import decode, encode, minmax_grid, searched_grid
from glmexport.formats.packing import pack_bits, unpack_bits
from glmexport.foundation.recipe import Format


class AffineGrid:
    """Evenly spaced levels, of which the zero point is the code of 0."""

    def __init__(self, scale: Tensor, zero_point: Tensor, bits: int) -> None:
        self.scale = scale
        self.zero_point = zero_point
        self._bits = bits
        self._low, self._high = -zero_point, 2**bits - 1 - zero_point

    def nearest_(self, scaled: Tensor) -> Tensor:
        """Round to whole numbers within the range of the codes, in place."""
        return scaled.round_().clamp_(self._low, self._high)

    def levels(self, codes: Tensor) -> Tensor:
        """Return ``codes`` less their zero point."""
        return codes.float() - self.zero_point

    def codes(self, levels: Tensor) -> Tensor:
        """Return ``levels`` and their zero point."""
        return (levels + self.zero_point).to(torch.uint8)

    def encode(self, weights: Tensor) -> Tensor:
        """Return the nearest codes, uint8."""
        return encode(weights, self.scale, self.zero_point, self._bits).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return (codes - zero_point) * scale, fp32."""
        return decode(codes, self.scale, self.zero_point)


class AffineCodec:
    """Codes of 2, 4 or 8 bits, several to a byte, with an fp16 scale and, unless symmetric, a zero point a group.

    A symmetric format's zero point is 2^(bits - 1) and takes no room; its scales have a sign. The last group of a row
    is filled up where it is short.
    """

    looked_up = True
    step = 1.0

    def __init__(self, form: Format) -> None:
        self.form = form

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of codes, scales, and zero points where these are not all the middle."""
        return ("codes", "scales") if self.form.symmetric else ("codes", "scales", "zero_points")

    @property
    def reach(self) -> float:
        """The magnitude 2^(bits - 1) of a symmetric format's lowest level."""
        return float(2 ** (self.form.bits - 1))

    @property
    def searched(self) -> bool:
        """Whether the search gains anything, which it does not at 8 bits."""
        return self.form.bits < 8

    def holds(self, columns: int) -> bool:
        """Return True: a short last group is padded."""
        return columns > 0

    def stored_bits(self, shape: tuple[int, ...]) -> int:
        """Return the bits of codes, fp16 scales and packed zero points."""
        rows, columns = shape
        groups = self._groups(columns)
        zero_points = 0 if self.form.symmetric else rows * 8 * -(-groups * self.form.bits // 8)
        return rows * groups * (self.form.group_size * self.form.bits + 16) + zero_points

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the packed tensors; whole groups of codes, and zero points in whole bytes a row."""
        bits, groups = self.form.bits, self._groups(columns)
        every = {
            "codes": (rows, groups, self.form.group_size * bits // 8),
            "scales": (rows, groups),
            "zero_points": (rows, -(-groups * bits // 8)),
        }
        return {part: every[part] for part in self.parts}

    def fit(self, weights: Tensor, importance: Tensor | None) -> AffineGrid:
        """Return the min-max grid of the group, or the searched one."""
        if importance is None:
            return AffineGrid(*minmax_grid(weights, self.form), self.form.bits)
        return AffineGrid(*searched_grid(weights, importance, self.form), self.form.bits)

    def grid(self, scale: Tensor, zero_point: Tensor) -> AffineGrid:
        """Return the grid of that scale and zero point."""
        return AffineGrid(scale, zero_point, self.form.bits)

    def numbers(self, codes: Tensor, scales: Tensor, zero_points: Tensor) -> Numbers:
        """Return the same in the types that are stored; a symmetric format drops the zero points."""
        return Numbers(codes, scales.half(), None if self.form.symmetric else zero_points.to(torch.uint8))

    def dequantize(self, numbers: Numbers) -> Tensor:
        """Return (codes - zero_points) * scales, fp32."""
        size, span = numbers.codes.shape[1], self.form.group_size

        def spread(per_group: Tensor) -> Tensor:
            return per_group.float().repeat_interleave(span, 1)[:, :size]

        middle = float(2 ** (self.form.bits - 1))
        zero = middle if numbers.zero_points is None else spread(numbers.zero_points)
        return (numbers.codes.float() - zero) * spread(numbers.scales)

    def pack(self, numbers: Numbers) -> dict[str, Tensor]:
        """Return codes [N, G, group_size * bits / 8] uint8, scales [N, G] fp16 and zero points [N, bytes] uint8.

        Columns that pad the last group hold the zero point: they add nothing, whatever a kernel multiplies them with.
        """
        rows, size = numbers.codes.shape
        bits, span = self.form.bits, self.form.group_size
        codes, groups = numbers.codes, self._groups(size)
        short = groups * span - size
        if short:
            if numbers.zero_points is None:
                codes = nn.functional.pad(codes, (0, short), value=2 ** (bits - 1))
            else:
                codes = torch.cat([codes, numbers.zero_points[:, -1:].expand(rows, short)], dim=1)
        packed = {"codes": pack_bits(codes.reshape(rows, groups, span), bits), "scales": numbers.scales}
        if numbers.zero_points is not None:
            padding = -groups % (8 // bits)
            packed["zero_points"] = pack_bits(nn.functional.pad(numbers.zero_points, (0, padding)), bits)
        return packed

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Numbers:
        """Return the numbers, without the padding of the last group and of the last byte of zero points."""
        codes, scales, zero_points = packed["codes"], packed["scales"], packed.get("zero_points")
        rows, groups = scales.shape
        bits = self.form.bits
        return Numbers(
            unpack_bits(codes, bits).reshape(rows, -1)[:, :columns].contiguous(),
            scales,
            None if zero_points is None else unpack_bits(zero_points, bits)[:, :groups].contiguous(),
        )

    def _groups(self, columns: int) -> int:
        return -(-columns // self.form.group_size)
