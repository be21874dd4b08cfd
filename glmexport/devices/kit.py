"""A device that no network reaches: an archive is carried there, one command is run, an archive is brought back."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from glmexport.devices.answers import RESULT_BYTES, read_result
from glmexport.devices.job import JOB, RESULT, read_job
from glmexport.foundation.errors import InputError, MachineError
from glmexport.foundation.files import write_atomically
from glmexport.foundation.progress import Progress
from glmexport.wire.runner import PROGRAM, program

KIT, KIT_RESULT = "kit:", "kit-result:"
_NAME = "glmexport-kit"
_CHUNK = 1 << 20
#: The exceptions of zipfile for a file that is no archive, is damaged or cut off, is encrypted, has names that are no
#: text, or lacks a member.
_UNREADABLE = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, LookupError, ArithmeticError, RuntimeError,
    ValueError,
)  # fmt: skip
#: The methods that archives of the program are packed by. With others the archive decides how much memory unpacking
#: takes.
_PACKED = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
#: Most bytes of the list of an archive's members, more than that of any job takes.
_LISTED = 4 << 20
_README = f"""Unpack this archive on the device, then run in the folder {_NAME}

    python3 {PROGRAM}

with a Python 3.9 or later that has numpy and onnxruntime. Nothing is installed and no network is used. An interrupted
run is gone on with by the same command. Bring back results.zip, which lies beside the program then.
"""


def write_kit(job: Path, archive: Path, progress: Progress) -> None:
    """Write the job and the program into ``archive``, which must not exist.

    Raises:
        InputError: the archive exists.
    """
    if archive.exists():
        raise InputError(f"{archive} exists.", next_step="Remove it, or name another file.")
    files = [JOB, *(entry.path for entry in read_job(job).files)]
    partial = archive.with_name(archive.name + ".partial")
    try:
        with zipfile.ZipFile(partial, "w") as kit, progress.track("Packing", len(files)) as track:
            kit.writestr(f"{_NAME}/README.txt", _README)
            kit.writestr(f"{_NAME}/{PROGRAM}", program())
            for path in files:
                kit.write(job / path, f"{_NAME}/job/{path}")
                track.advance(1, path)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(archive)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class _InPieces(io.BufferedReader):
    """A file that refuses to read more at once than a list of members may take, which zipfile reads in one piece."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__(file)

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as a file does, but no more than the limit."""
        if size is not None and size > _LISTED:
            raise zipfile.BadZipFile("it has too many members")
        # zipfile gives no size only when it reads the last 64 KiB.
        return super().read(_LISTED if size is None or size < 0 else size)


@dataclass(frozen=True)
class KitResultRunner:
    """The results of a device in ``archive``; only files that answer the job are taken, in the announced size."""

    name: str
    archive: Path

    def __call__(self, job: Path, results: Path, progress: Progress) -> None:
        """Take the device's answers from the archive; see ``Runner``."""
        with ExitStack() as stack:
            with self._reading():
                if not self.archive.is_file():
                    raise FileNotFoundError("it is no file")
                file = stack.enter_context(_InPieces(io.FileIO(self.archive)))
                archive = stack.enter_context(zipfile.ZipFile(file))
            content = self._read(archive, RESULT, RESULT_BYTES)
            result = read_result(content, job, self.name)
            with progress.track("Unpacking", len(result.files)) as track:
                for entry in result.files:
                    self._unpack(archive, entry.path, entry.size, results / entry.path)
                    track.advance(1, entry.path)
        write_atomically(results / RESULT, content)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn errors of reading the archive into one about it; an error of writing here is no fault of the archive."""
        try:
            yield
        except _UNREADABLE as error:
            raise MachineError(
                f"{self.name}: {self.archive} cannot be read: {error}.",
                next_step="Bring the device's results.zip again.",
            ) from error

    def _read(self, archive: zipfile.ZipFile, name: str, most: int) -> bytes:
        content = bytearray()
        with self._reading(), self._member(archive, name) as file:
            while len(content) <= most and (block := file.read(_CHUNK)):
                content += block
        if len(content) > most:
            raise MachineError(f"{self.name}: {name} has more than {most} bytes.", next_step="Refuse the archive.")
        return bytes(content)

    def _member(self, archive: zipfile.ZipFile, name: str) -> IO[bytes]:
        if archive.getinfo(name).compress_type not in _PACKED:
            raise zipfile.BadZipFile(f"{name} is packed in a way that the program does not")
        return archive.open(name)

    def _unpack(self, archive: zipfile.ZipFile, name: str, size: int, path: Path) -> None:
        """Unpack no more than ``size`` bytes; they are checked later, as those of any device."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._reading():
            source = self._member(archive, name)
        with source, path.open("wb") as target:
            while (left := size - target.tell()) > 0:
                with self._reading():
                    block = source.read(min(left, _CHUNK))
                if not block:
                    break
                target.write(block)
