"""The files of a job and of its results are read, checked, and written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Tell = Callable[[dict[str, Any]], None]

_DTYPES = {"I32": "<i4", "I64": "<i8", "F32": "<f4"}
_NAMES = {"int32": "I32", "float32": "F32"}
_AGAIN = "Bring the job again."


class Failure(Exception):
    """An error: its kind for programs, the message, and the next step."""

    def __init__(self, kind: str, message: str, next_step: str) -> None:
        super().__init__(message)
        self.event = {"event": "error", "kind": kind, "message": message, "next_step": next_step}


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the arrays by name, mapped, of a file that has been verified.

    The format (https://github.com/huggingface/safetensors): the length of the header, 8 bytes, little endian; the
    header, JSON from name to dtype, shape and offsets of the first byte and after the last; the tensors' bytes.
    """
    import numpy as np

    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    data, found = np.memmap(path, np.uint8, "r"), {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = data[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write int32 and float32 arrays by name, in the same format; the same arrays give the same bytes."""
    import numpy as np

    header, offset = {}, 0
    for name in sorted(tensors):
        array = tensors[name]
        header[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8.
    text += b" " * (-len(text) % 8)
    parts = (np.ascontiguousarray(tensors[name]).tobytes() for name in sorted(tensors))
    replace(path, itertools.chain([struct.pack("<Q", len(text)), text], parts))


def replace(path: Path, parts: Iterable[bytes]) -> None:
    """Write ``parts`` one after the other; even after a crash the file is whole, or the former one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def verify(job: dict[str, Any], folder: Path, tell: Tell) -> None:
    """Check that every file of the job is there, byte for byte."""
    for number, (path, there) in enumerate(looked_at(job, folder), 1):
        if not there:
            raise Failure(
                "files", f"{folder / path} is missing or not the file of the job (its sha256 differs).", _AGAIN
            )
        tell({"event": "verified", "index": number, "of": len(job["files"])})


def looked_at(job: dict[str, Any], folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield the path of every file of the job, and whether it is there, byte for byte."""
    for entry in job["files"]:
        relative = Path(entry["path"])
        if relative.is_absolute() or ".." in relative.parts:
            raise Failure("files", f"The job names a file outside of its folder: {relative}.", _AGAIN)
        path = folder / relative
        yield (
            entry["path"],
            path.is_file() and path.stat().st_size == entry["size"] and sha256(path) == entry["sha256"],
        )
