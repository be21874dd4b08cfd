"""A device that nothing reaches: an archive is carried there, one command is run, and an archive is brought back."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from glmexport.errors import InputError, MachineError
from glmexport.progress import Progress
from glmexport.quantization import write_atomically
from glmexport.validation.devices.answers import RESULT_BYTES, read_result
from glmexport.validation.devices.job import JOB, RESULT, read_job
from glmexport.validation.devices.runner import PROGRAM, program

KIT, KIT_RESULT = "kit:", "kit-result:"
_NAME = "glmexport-kit"
_CHUNK = 1 << 20
#: By what zipfile tells of a file that is none, is damaged or cut off, is encrypted, or lacks a member.
_UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError, RuntimeError)
_README = f"""Unpack this archive on the device, then run in the folder {_NAME}

    python3 {PROGRAM}

with a Python 3.9 or later that has numpy and onnxruntime. Nothing is installed and no network is used. An interrupted
run is gone on with by the same command. Bring back results.zip, which lies beside the program then.
"""


def write_kit(job: Path, archive: Path, progress: Progress) -> None:
    """Write the job and the program into ``archive``, which must not exist.

    Raises:
        InputError: it exists.
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


@dataclass(frozen=True)
class KitResultRunner:
    """What a device wrote into ``archive``. Only the files that answer the job are taken, and only as announced."""

    name: str
    archive: Path

    def __call__(self, job: Path, results: Path, progress: Progress) -> None:
        """See ``Runner``."""
        with self._reading():
            archive = zipfile.ZipFile(self.archive)
        with archive:
            content = self._read(archive, RESULT, RESULT_BYTES)
            result = read_result(content, job, self.name)
            with progress.track("Unpacking", len(result.files)) as track:
                for entry in result.files:
                    self._unpack(archive, entry.path, entry.size, results / entry.path)
                    track.advance(1, entry.path)
        write_atomically(results / RESULT, content)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Whatever cannot be read of the archive is told of it; what cannot be written here is none of its faults."""
        try:
            yield
        except _UNREADABLE as error:
            raise MachineError(
                f"{self.name}: {self.archive} cannot be read: {error}.",
                next_step="Bring the device's results.zip again.",
            ) from error

    def _read(self, archive: zipfile.ZipFile, name: str, most: int) -> bytes:
        with self._reading(), archive.open(name) as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise MachineError(f"{self.name}: {name} has more than {most} bytes.", next_step="Refuse the archive.")
        return content

    def _unpack(self, archive: zipfile.ZipFile, name: str, size: int, path: Path) -> None:
        """No more than ``size`` bytes; whether they are the right ones is looked at later, as of any device."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._reading():
            source = archive.open(name)
        with source, path.open("wb") as target:
            while (left := size - target.tell()) > 0:
                with self._reading():
                    block = source.read(min(left, _CHUNK))
                if not block:
                    break
                target.write(block)
