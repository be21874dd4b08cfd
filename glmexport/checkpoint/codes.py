"""Matrices that files hold as integers, with a scale and a zero point a group: what every such layout has in common.

The weight is (code - zero point) * scale, with codes in 0 .. 2^bits - 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glmexport.checkpoint.header import TensorEntry
from glmexport.checkpoint.reading import reading_errors
from glmexport.checkpoint.shards import Shards
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.recipe import Format

if TYPE_CHECKING:
    from torch import Tensor

WORD_BITS = 32
#: Scales of wider groups are repeated for several groups of this many weights, which changes no product.
_SPLIT = 128
_GROUP_SIZES = (16, 32, 64, 128, 256)
GROUP_SIZES = f"{', '.join(map(str, _GROUP_SIZES))}, multiples of {_SPLIT}, and -1"
"""The groups that ``holds_groups`` takes, for messages."""


@dataclass(frozen=True)
class CodeFormat:
    """The format that one matrix is stored in."""

    bits: int
    #: Weights that share a scale; -1: all of a row.
    group_size: int
    symmetric: bool

    @property
    def exact(self) -> Format:
        """The format in which a bundle stores the same codes; where its groups are smaller, scales are repeated."""
        size = self.group_size if self.group_size in _GROUP_SIZES else _SPLIT
        return Format.model_validate({"bits": self.bits, "group_size": size, "symmetric": self.symmetric})

    @property
    def label(self) -> str:
        """The short name, for example ``w4g128-sym``; ``w4row`` where a row has one scale."""
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"w{self.bits}{group}{'-sym' if self.symmetric else ''}"


def holds_groups(group_size: int) -> bool:
    """Return whether a bundle can store groups of ``group_size`` as they are, or cut into smaller ones."""
    return group_size in _GROUP_SIZES or group_size == -1 or (group_size > 0 and group_size % _SPLIT == 0)


@dataclass(frozen=True)
class Codes:
    """Rows of a matrix as stored: ``codes`` [n, K] uint8, ``scales`` [n, G], ``zero_points`` [n, G] uint8.

    Scales are in the type of the file, and of a matrix whose codes are kept each is a value that fp16 has.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor

    @classmethod
    def concatenate(cls, parts: Iterable[Codes]) -> Codes:
        """Return the rows of all ``parts``, which are coded alike."""
        import torch

        columns = zip(*((part.codes, part.scales, part.zero_points) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))


class CodedMatrix(ABC):
    """One matrix [rows, columns] of integer codes. A layout says how its files hold it."""

    #: The layout's name, which stands for a dtype in lists of tensors.
    layout: ClassVar[str]
    module: str
    form: CodeFormat
    rows: int
    columns: int

    @property
    @abstractmethod
    def entries(self) -> tuple[TensorEntry, ...]:
        """The stored tensors that it consists of."""

    @property
    @abstractmethod
    def scale_entry(self) -> TensorEntry:
        """The stored scales."""

    @abstractmethod
    def stored_rows(self, start: int, stop: int) -> Codes:
        """Return rows [start, stop), with a scale and a zero point for each group of the file.

        Raises:
            CheckpointError: a zero point or code is not what the configuration says.
            MachineError: a shard cannot be read, or there is not enough memory.
        """

    @property
    def label(self) -> str:
        """The short name of its format."""
        return self.form.label

    @property
    def bytes(self) -> int:
        """The bytes of its tensors in their files."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def span(self) -> int:
        """The number of inputs that share a stored scale."""
        return self.columns if self.form.group_size == -1 else self.form.group_size

    def decode(self, start: int, stop: int) -> Codes:
        """Return rows [start, stop), with the scales of wide groups repeated for groups of ``form.exact.group_size``.

        Raises:
            CheckpointError: a scale is not finite; and as ``stored_rows``.
            MachineError: as ``stored_rows``.
        """
        import torch

        stored = self.stored_rows(start, stop)
        if not bool(stored.scales.isfinite().all()):
            raise _not_finite(self.scale_entry)
        repeats = torch.arange(0, self.columns, self.form.exact.group_size) // self.span
        scales, zero_points = (each[:, repeats].contiguous() for each in (stored.scales, stored.zero_points))
        return Codes(stored.codes.contiguous(), scales, zero_points)

    def read_codes(self, shards: Shards, start: int, stop: int) -> Codes:
        """Return rows [start, stop) as ``decode`` does; raises as ``Shards.refuse_changed`` does."""
        shards.refuse_changed(*self.entries)
        return self.decode(start, stop)

    def read(self, shards: Shards, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) as ``dequantize`` does; raises as ``Shards.refuse_changed`` does."""
        shards.refuse_changed(*self.entries)
        return self.dequantize(start, stop)

    def dequantize(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) as fp32: exactly where a scale has 16 bits, as a product has 19 at most then."""
        decoded = self.decode(start, stop)
        size = self.form.exact.group_size

        def spread(per_group: Tensor) -> Tensor:
            return per_group.float().repeat_interleave(size, 1)[:, : self.columns]

        return (decoded.codes.float() - spread(decoded.zero_points)).mul_(spread(decoded.scales))


def unpacked(words: Tensor, bits: int, axis: int) -> Tensor:
    """Return the fields of int32 ``words`` along ``axis``, the first in the lowest bits, as uint8."""
    import torch

    fields = WORD_BITS // bits
    words = words.movedim(axis, -1)
    values = torch.empty(*words.shape, fields, dtype=torch.uint8)
    for field in range(fields):
        # A shift of a negative word repeats its sign, which the mask cuts off.
        values[..., field] = (words >> (bits * field)) & (2**bits - 1)
    return values.flatten(-2).movedim(-1, axis)


def read_entry(entry: TensorEntry, rows: slice | None = None, columns: slice | None = None) -> Tensor:
    """Return a stored tensor, or some of its rows or columns, in its own dtype and in memory of its own."""
    from safetensors import safe_open

    with reading_errors(entry), safe_open(entry.path, framework="pt", device="cpu") as shard:
        if rows is None and columns is None:
            stored = shard.get_tensor(entry.name)
        else:
            part = shard.get_slice(entry.name)
            stored = part[rows] if columns is None else part[rows or slice(0, None), columns]
        tensor: Tensor = stored.clone()
        return tensor


def read_each(entries: Iterable[TensorEntry]) -> Iterator[tuple[TensorEntry, Tensor]]:
    """Yield small tensors, whole; each file is opened once, since headers of large checkpoints take their time."""
    from safetensors import safe_open

    by_file: dict[object, list[TensorEntry]] = {}
    for entry in entries:
        by_file.setdefault(entry.path, []).append(entry)
    for group in by_file.values():
        with reading_errors(group[0]):
            shard = safe_open(group[0].path, framework="pt", device="cpu")
        with shard as opened:
            for entry in group:
                with reading_errors(entry):
                    tensor: Tensor = opened.get_tensor(entry.name).clone()
                yield entry, tensor


def inexact_scale(matrices: Iterable[CodedMatrix]) -> str | None:
    """Return which scale fp16, the type of a bundle's scales, does not hold; None if it holds all of them.

    Only scales that are not stored as fp16 are read.

    Raises:
        CheckpointError: a scale is not finite.
        MachineError: a shard cannot be read.
    """
    for entry, scales in read_each(m.scale_entry for m in matrices if m.scale_entry.dtype != "F16"):
        values = scales.float().flatten()
        if not bool(values.isfinite().all()):
            raise _not_finite(entry)
        other = values.half().float() != values
        if bool(other.any()):
            first = float(values[int(other.int().argmax())])
            return f"{entry.path}: {entry.name} is {entry.dtype} and has {first:.9g}, which fp16 does not hold"
    return None


def _not_finite(entry: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"{entry.path}: tensor {entry.name!r} has values that are not finite.",
        next_step="Download the checkpoint again, or quantize the model again.",
    )
