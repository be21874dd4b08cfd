"""A quantized matrix: its codes, scales and zero points, and the matrix that they mean."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glmexport.formats.codec import Codec, Numbers
from glmexport.formats.codecs import codec_of, stored_bits
from glmexport.foundation.recipe import Format

_SLAB_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class QuantizedLinear:
    """W [N, K] in the format ``form``, with scale and zero point shared by ``group_size`` inputs.

    ``codes`` [N, K] uint8; ``scales`` [N, G] fp16; ``zero_points`` [N, G] uint8, None for a format without any;
    G = ceil(K / group_size). The codec decides what they mean.
    """

    form: Format
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    @classmethod
    def from_numbers(cls, form: Format, numbers: Numbers) -> QuantizedLinear:
        """Return the matrix of these ``numbers``."""
        return cls(form, numbers.codes, numbers.scales, numbers.zero_points)

    @classmethod
    def unpack(cls, form: Format, packed: Mapping[str, Tensor], columns: int) -> QuantizedLinear:
        """Return the matrix that is stored as the ``packed`` tensors, by part; the inverse of ``pack``."""
        return cls.from_numbers(form, codec_of(form).unpack(packed, columns))

    def pack(self) -> dict[str, Tensor]:
        """Return the tensors that are stored, by part: codes, scales, and zero_points where there are any."""
        return self.codec.pack(Numbers(self.codes, self.scales, self.zero_points))

    @property
    def codec(self) -> Codec:
        """The codec that says how the numbers are stored and what they mean."""
        return codec_of(self.form)

    @property
    def groups(self) -> int:
        """The number of scales in a row."""
        return self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """Return the matrix that the runtime computes with, [N, K] fp32.

        A slab of rows at a time bounds the temporaries.
        """
        rows, size = self.codes.shape
        matrix = torch.empty(rows, size, device=self.codes.device)
        slab = max(1, _SLAB_WEIGHTS // size)
        for start in range(0, rows, slab):
            matrix[start : start + slab] = self.rows(start, min(start + slab, rows))
        return matrix

    def lookup(self, ids: Tensor) -> Tensor:
        """Return rows ``ids`` [...] of the dequantized matrix, [..., K] fp32."""
        flat = ids.flatten().to(self.codes.device)
        zero_points = None if self.zero_points is None else self.zero_points[flat]
        chosen = replace(self, codes=self.codes[flat], scales=self.scales[flat], zero_points=zero_points)
        return chosen.dequantize().reshape(*ids.shape, -1)

    def apply(self, inputs: Tensor) -> Tensor:
        """Return ``inputs`` [..., K] fp32 times the transposed matrix, [..., N] fp32, a slab of rows at a time."""
        rows, size = self.codes.shape
        outputs = inputs.new_empty(*inputs.shape[:-1], rows)
        slab = max(1, _SLAB_WEIGHTS // size)
        for start in range(0, rows, slab):
            stop = min(start + slab, rows)
            outputs[..., start:stop] = inputs @ self.rows(start, stop).T
        return outputs

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` of the dequantized matrix, fp32."""
        return self.codec.dequantize(self._slice(start, stop))

    def steps(self, start: int, stop: int) -> Tensor:
        """Return the mean distance between neighbouring values of each weight's group, for rows ``start`` to ``stop``.

        [rows, K] fp32, with the sign of the scale.
        """
        spread = self.scales[start:stop].float().repeat_interleave(self.form.group_size, 1)
        return spread[:, : self.codes.shape[1]] * self.codec.step

    def take(self, start: int, stop: int) -> QuantizedLinear:
        """Return the matrix of rows ``start`` to ``stop``."""
        return QuantizedLinear.from_numbers(self.form, self._slice(start, stop))

    def with_rows(self, chosen: Tensor, other: QuantizedLinear) -> QuantizedLinear:
        """Return the rows ``chosen`` [N] bool of ``other``, of the same format and shape, and the rest of this one."""

        def either(theirs: Tensor, ours: Tensor) -> Tensor:
            return torch.where(chosen[:, None], theirs, ours)

        zero_points = None
        if self.zero_points is not None and other.zero_points is not None:
            zero_points = either(other.zero_points, self.zero_points)
        return QuantizedLinear(
            self.form, either(other.codes, self.codes), either(other.scales, self.scales), zero_points
        )

    def digest(self) -> str:
        """Return the SHA-256 over format and numbers, however they are packed where the matrix is stored."""
        digest = hashlib.sha256(f"{self.form.label} {list(self.codes.shape)}".encode())
        for tensor in (self.codes, self.scales.half(), self.zero_points):
            if tensor is not None:
                digest.update(tensor.contiguous().cpu().numpy().data.cast("B"))
        return f"sha256:{digest.hexdigest()}"

    @property
    def stored_bits(self) -> int:
        """The bits of codes, scales and zero points in the types they are stored in, padding of groups included."""
        return stored_bits(tuple(self.codes.shape), self.form)

    @property
    def bits_per_weight(self) -> float:
        """The stored bits divided by the number of weights."""
        return self.stored_bits / self.codes.numel()

    @staticmethod
    def concatenate(parts: list[QuantizedLinear]) -> QuantizedLinear:
        """Return one matrix of the rows of several of the same format and width, in order."""
        zero_points = [part.zero_points for part in parts if part.zero_points is not None]
        return QuantizedLinear(
            parts[0].form,
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(zero_points) if zero_points else None,
        )

    def _slice(self, start: int, stop: int) -> Numbers:
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        return Numbers(self.codes[start:stop], self.scales[start:stop], zero_points)
