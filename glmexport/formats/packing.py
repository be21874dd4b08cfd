"""Codes are packed into bytes in the layout of ONNX Runtime's MatMulNBits: the first code in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return ``codes`` [..., n] uint8 as [..., n * bits / 8] uint8; n * bits is a multiple of 8."""
    each = 8 // bits
    packed = codes[..., 0::each].clone()
    for position in range(1, each):
        packed |= codes[..., position::each] << (bits * position)
    return packed


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Return the codes [..., n * 8 / bits] uint8 in ``packed`` [..., n] uint8."""
    mask = 2**bits - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
