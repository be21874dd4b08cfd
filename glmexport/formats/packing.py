"""Bits into bytes, in the layout of ONNX Runtime's MatMulNBits: the first code of a byte in its lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format


def pack_codes(linear: QuantizedLinear) -> Tensor:
    """Codes as [N, G, group_size * bits / 8] uint8; columns that pad the last group hold the zero point."""
    rows, size = linear.codes.shape
    span = linear.form.group_size
    codes = linear.codes
    short = linear.groups * span - size
    if short:
        if linear.zero_points is None:
            codes = nn.functional.pad(codes, (0, short), value=2 ** (linear.form.bits - 1))
        else:
            codes = torch.cat([codes, linear.zero_points[:, -1:].expand(rows, short)], dim=1)
    return _pack(codes.reshape(rows, linear.groups, span), linear.form.bits)


def pack_zero_points(linear: QuantizedLinear) -> Tensor | None:
    """Zero points as [N, ceil(G * bits / 8)] uint8; None for a symmetric format."""
    if linear.zero_points is None:
        return None
    padding = -linear.groups % (8 // linear.form.bits)
    return _pack(nn.functional.pad(linear.zero_points, (0, padding)), linear.form.bits)


def unpack(
    form: Format, in_features: int, codes: Tensor, scales: Tensor, zero_points: Tensor | None
) -> QuantizedLinear:
    """The inverse of packing. ``codes`` [N, G, bytes] uint8, ``scales`` [N, G] fp16, ``zero_points`` [N, bytes]."""
    rows, groups = scales.shape
    return QuantizedLinear(
        form,
        _unpack(codes, form.bits).reshape(rows, -1)[:, :in_features].contiguous(),
        scales,
        None if zero_points is None else _unpack(zero_points, form.bits)[:, :groups].contiguous(),
    )


def _pack(codes: Tensor, bits: int) -> Tensor:
    each = 8 // bits
    packed = codes[..., 0::each].clone()
    for position in range(1, each):
        packed |= codes[..., position::each] << (bits * position)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    mask = 2**bits - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
