"""QuantizedLinear: codes, scales and zero points of one matrix, and what they cost to store."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glmexport.foundation.recipe import Format

_SLAB_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class QuantizedLinear:
    """W [N, K] ~ (codes - zero_points) * scales, with scale and zero point shared by ``group_size`` inputs.

    ``codes`` [N, K] uint8; ``scales`` [N, G] fp16; ``zero_points`` [N, G] uint8, None for a symmetric format
    (2^(bits - 1)); G = ceil(K / group_size).
    """

    form: Format
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    @property
    def groups(self) -> int:
        """Scales a row."""
        return self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """The matrix that the runtime computes with, [N, K] fp32; a slab of rows at a time bounds the temporaries."""
        rows, size = self.codes.shape
        matrix = torch.empty(rows, size, device=self.codes.device)
        slab = max(1, _SLAB_WEIGHTS // size)
        for start in range(0, rows, slab):
            matrix[start : start + slab] = self.rows(start, min(start + slab, rows))
        return matrix

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` [...] of the dequantized matrix, [..., K] fp32."""
        flat = ids.flatten().to(self.codes.device)
        zero_points = None if self.zero_points is None else self.zero_points[flat]
        chosen = replace(self, codes=self.codes[flat], scales=self.scales[flat], zero_points=zero_points)
        return chosen.dequantize().reshape(*ids.shape, -1)

    def apply(self, inputs: Tensor) -> Tensor:
        """``inputs`` [..., K] fp32 times the transposed matrix, [..., N] fp32, a slab of rows at a time."""
        rows, size = self.codes.shape
        outputs = inputs.new_empty(*inputs.shape[:-1], rows)
        slab = max(1, _SLAB_WEIGHTS // size)
        for start in range(0, rows, slab):
            stop = min(start + slab, rows)
            outputs[..., start:stop] = inputs @ self.rows(start, stop).T
        return outputs

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the dequantized matrix, fp32."""
        size = self.codes.shape[1]
        span = self.form.group_size

        def spread(per_group: Tensor) -> Tensor:
            return per_group[start:stop].float().repeat_interleave(span, 1)[:, :size]

        zero = float(2 ** (self.form.bits - 1)) if self.zero_points is None else spread(self.zero_points)
        return (self.codes[start:stop].float() - zero) * spread(self.scales)

    def with_rows(self, chosen: Tensor, other: QuantizedLinear) -> QuantizedLinear:
        """The rows ``chosen`` [N] bool of ``other``, which has the same format and shape, and the rest of this one."""

        def either(theirs: Tensor, ours: Tensor) -> Tensor:
            return torch.where(chosen[:, None], theirs, ours)

        zero_points = None
        if self.zero_points is not None and other.zero_points is not None:
            zero_points = either(other.zero_points, self.zero_points)
        return QuantizedLinear(
            self.form, either(other.codes, self.codes), either(other.scales, self.scales), zero_points
        )

    def digest(self) -> str:
        """SHA-256 over format and numbers, however they are packed where the matrix is stored."""
        digest = hashlib.sha256(f"{self.form.label} {list(self.codes.shape)}".encode())
        for tensor in (self.codes, self.scales.half(), self.zero_points):
            if tensor is not None:
                digest.update(tensor.contiguous().cpu().numpy().data.cast("B"))
        return f"sha256:{digest.hexdigest()}"

    @property
    def stored_bits(self) -> int:
        """Bits of codes, scales and zero points in the types they are stored in, padding of groups included."""
        return stored_bits(tuple(self.codes.shape), self.form)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by the number of weights."""
        return self.stored_bits / self.codes.numel()

    @staticmethod
    def concatenate(parts: list[QuantizedLinear]) -> QuantizedLinear:
        """One matrix of the rows of several of the same format and width, in order."""
        zero_points = [part.zero_points for part in parts if part.zero_points is not None]
        return QuantizedLinear(
            parts[0].form,
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(zero_points) if zero_points else None,
        )


def stored_bits(shape: tuple[int, ...], form: Format | None) -> int:
    """Bits that a tensor of ``shape`` takes: codes, fp16 scales, packed zero points; fp32 where ``form`` is None."""
    if form is None:
        return math.prod(shape) * 32
    rows, size = shape
    groups = -(-size // form.group_size)
    zero_points = 0 if form.symmetric else rows * 8 * -(-groups * form.bits // 8)
    return rows * groups * (form.group_size * form.bits + 16) + zero_points
