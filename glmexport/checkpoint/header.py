"""Strict reader of the safetensors header: everything that can be wrong is found before a byte is mapped.

8 bytes     length N of the header, unsigned little-endian
N bytes     JSON object: tensor name -> {"dtype", "shape", "data_offsets"}, and "__metadata__"
the rest    data; offsets count from its start
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.files import unreadable
from glmexport.foundation.untrusted import DocumentLimits, open_regular, parse_object

#: Bytes of one header. A model of 120,000 tensors in one file has a header of 15 MB; the format itself allows 100 MB.
HEADER_LIMITS = DocumentLimits(size=32 << 20, depth=3, values=2_000_000, items=1 << 16, keys=200_000)
_RANK_LIMIT = 64
_DIMENSION_LIMIT = 2**63

WEIGHT_DTYPES = ("F32", "F16", "BF16")
"""The types that a weight may be stored as."""

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}

_AGAIN = "Download the shard again, or copy it again from where it is complete."


@dataclass(frozen=True)
class TensorEntry:
    """The place of one tensor: ``[begin, end)`` in bytes from the start of the data of ``path``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    path: Path

    @property
    def elements(self) -> int:
        """The product of the shape; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The size of the tensor's data in the file."""
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file, in the order of their data.

    Every dtype of the format is accepted here, so that a message can name it; whether it can be used as a
    weight is decided when it is read.

    Raises:
        CheckpointError: the file does not follow the format, or is shorter or longer than its header says;
            names the file and the tensor.
        MachineError: the machine does not let us read the file.
    """
    try:
        stream, size = open_regular(path)
        with stream:
            start = stream.read(8)
            if len(start) < 8:
                raise _damaged(path, f"has {size} bytes, and a safetensors file starts with 8 bytes of length")
            length = int.from_bytes(start, "little")
            if length > (most := HEADER_LIMITS.size):
                raise _damaged(path, f"gives its header {length:,} bytes; at most {most:,} are accepted")
            if length > size - 8:
                raise _damaged(path, f"is truncated in its header: {length - (size - 8):,} bytes are missing")
            text = stream.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise _damaged(path, f"cannot be read: {error}") from error
    if len(text) != length:
        raise _damaged(path, "became shorter while it was read")
    entries = _entries(path, text)
    _check_layout(path, entries, data_size=size - 8 - length)
    return {entry.name: entry for entry in entries}


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}.", next_step=_AGAIN)


def _entries(path: Path, text: bytes) -> list[TensorEntry]:
    if not text.startswith(b"{"):
        raise _damaged(path, "has no JSON object for a header; it is not a safetensors file")
    try:
        table = parse_object(text, HEADER_LIMITS)
    except ValueError as error:
        raise _damaged(path, f"has a header that is not usable: {error}") from error
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "has a __metadata__ that is not a table of texts")
    return sorted(
        (_entry(path, name, fields) for name, fields in table.items()),
        key=lambda entry: (entry.begin, entry.end),
    )


def _entry(path: Path, name: str, fields: object) -> TensorEntry:
    where = f"has in its header tensor {name!r}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{where} without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(path, f"{where} of the unknown dtype {dtype!r}")
    if not _is_naturals(shape) or len(shape) > _RANK_LIMIT:
        raise _damaged(path, f"{where} whose shape is not a list of at most {_RANK_LIMIT} non-negative integers")
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{where} whose data_offsets are not two ascending integers")
    entry = TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1], path)
    if entry.elements * _BITS[dtype] != entry.bytes * 8:
        raise _damaged(
            path,
            f"{where} with {entry.bytes:,} bytes of data, and {dtype} of shape {list(shape)} "
            f"needs {-(-entry.elements * _BITS[dtype] // 8):,}",
        )
    return entry


def _is_naturals(value: object) -> bool:
    # bool is an int to Python and not to the format.
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < _DIMENSION_LIMIT for item in cast(list[object], value)
    )


def _check_layout(path: Path, entries: list[TensorEntry], data_size: int) -> None:
    """The entries, in order of their data, cover it without overlap and without a hole."""
    reached, before = 0, "the start of the data"
    for entry in entries:
        if entry.begin < reached:
            raise _damaged(path, f"has overlapping data: tensor {entry.name!r} begins inside {before}")
        if entry.begin > reached:
            raise _damaged(
                path,
                f"has a hole of {entry.begin - reached:,} bytes between {before} and tensor {entry.name!r}",
            )
        reached, before = entry.end, f"tensor {entry.name!r}"
    if reached > data_size:
        cut = next(entry.name for entry in entries if entry.end > data_size)
        raise _damaged(
            path,
            f"is truncated: {reached - data_size:,} of {reached:,} bytes of data are missing, from tensor {cut!r} on",
        )
    if reached < data_size:
        raise _damaged(path, f"has {data_size - reached:,} bytes after {before} that no tensor describes")
