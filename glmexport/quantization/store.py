"""The work directory of a walk: quantized matrices and activations, committed block by block.

A step (the embedding, a block, the head) is committed by its record, which is written last and names the size and
SHA-256 of every file of the step. Whatever a killed walk leaves without a record does not exist.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glmexport.formats.codecs import codec_of
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.definition import Definition, read_json
from glmexport.foundation.errors import MachineError
from glmexport.foundation.files import sha256, write_atomically
from glmexport.foundation.recipe import Format
from glmexport.foundation.untrusted import DocumentLimits
from glmexport.reference.reference import CPU

_SCRATCH = "scratch"
#: Bytes of a stream that are written before the disk has to have them.
_SYNCED_BYTES = 64 << 20
#: Limits of a record, which has every matrix of a block, or the measurements of every document.
_LIMITS = DocumentLimits(values=4_000_000, items=4_000_000, keys=100_000, nonfinite=True)


class Activations:
    """A file of hidden states [sequences, length, hidden] fp32, read and written a few sequences at a time.

    They are read to ``device``, and may be written from any.

    They are read and written plainly, without a mapping: pages of a mapping count as resident memory, and here every
    page is touched exactly once per block.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], device: torch.device) -> None:
        self.path = path
        self.shape = shape
        self.device = device

    def read(self, start: int, stop: int) -> Tensor:
        """Return sequences ``start`` to ``stop``."""
        _, length, hidden = self.shape
        states = torch.empty(stop - start, length, hidden)
        with self.path.open("rb", buffering=0) as file:
            file.seek(start * length * hidden * 4)
            view = states.numpy().data.cast("B")
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise EOFError(f"{self.path} ends early")
                done += count
        return states.to(self.device)

    def gather(self, positions: Tensor) -> Tensor:
        """Return rows [n, hidden] at ``positions`` [n] int64, counted through all sequences."""
        return self._mapped(shared=False)[positions.cpu()].to(self.device)

    def add(self, positions: Tensor, rows: Tensor) -> None:
        """Add ``rows`` [n, hidden] at ``positions`` [n] int64; what was never written is zero."""
        self._mapped(shared=True).index_add_(0, positions.cpu(), rows.cpu())

    def _mapped(self, *, shared: bool) -> Tensor:
        # The rows are all over the file, and plain reads would be one call each. The mapping is dropped at once, so
        # that only the pages of one call are ever resident.
        sequences, length, hidden = self.shape
        return torch.from_file(str(self.path), shared, sequences * length * hidden).reshape(-1, hidden)

    def write(self, start: int, states: Tensor) -> None:
        """Write ``states`` as the sequences from ``start`` on; the file is made on first use."""
        _, length, hidden = self.shape
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.seek(start * length * hidden * 4)
            file.write(_bytes(states))


class _File(Definition):
    """The size in bytes and the SHA-256 of a file of a step."""

    size: int
    sha256: str


class _Step(Definition):
    """The record of a committed step."""

    files: dict[str, _File]
    #: The formats of its matrices, by key.
    formats: dict[str, Format]
    in_features: dict[str, int]
    note: dict[str, Any]


class WorkDirectory:
    """The directory where a walk keeps what it has finished; ``job`` is everything the result depends on.

    Of the processes that share it, one ``makes`` it.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], *, makes: bool = True) -> None:
        self.path = path
        self.job = dict(job)
        if makes:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(path / "job.json", json.dumps(self.job, indent=2, sort_keys=True).encode())

    @classmethod
    def for_job(cls, parent: Path, job: Mapping[str, Any], *, makes: bool = True) -> WorkDirectory:
        """Open the directory under ``parent`` whose name is the digest of ``job``, so that no two jobs share one."""
        digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        return cls(parent / f".glmexport-work-{digest[:16]}", job, makes=makes)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a lock, so that no other process writes here meanwhile; a process that dies releases it.

        Raises:
            MachineError: another process does.
        """
        lock = FileLock(self.path / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise MachineError(
                f"Another build of the same job is at work in {self.path}.",
                next_step="Wait for it, or give this one another place with --output.",
            ) from None
        try:
            yield
        finally:
            lock.release()

    def record(self, step: str) -> dict[str, Any] | None:
        """Return the note of the commit of ``step``; None if there is none, or it or a file of it has changed since."""
        try:
            record = read_json(_Step, self.path / f"{step}.json", _LIMITS).model_dump()
        except (OSError, ValueError):
            # A record that is damaged or cut does not count: the step is computed again.
            return None
        for name, expected in record["files"].items():
            file = self.path / name
            # Activations of a step are removed once the next step is committed.
            if name.endswith(".activations") and not file.is_file():
                continue
            if not file.is_file() or file.stat().st_size != expected["size"] or sha256(file) != expected["sha256"]:
                return None
        return record

    def commit(
        self,
        step: str,
        linears: Mapping[str, QuantizedLinear],
        note: Mapping[str, Any],
        activations: Mapping[str, Iterator[Tensor] | Activations] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write matrices, other tensors, and the streams that the next step reads; flush them; then the record.

        A stream that is in a file already, as scratch activations are, is moved, not copied. ``note`` is read last, so
        that what is found out while the streams are made can be in it.
        """
        weights = self.path / f"{step}.safetensors"
        partial = weights.with_suffix(".partial")
        _save({**_tensors(linears), **(tensors or {})}, partial)
        _flush(partial)
        partial.replace(weights)
        files = [weights]
        for name, stream in (activations or {}).items():
            files.append(self._activations(step, name))
            if isinstance(stream, Activations):
                _flush(stream.path)
                stream.path.replace(files[-1])
            else:
                _write_stream(files[-1], stream)
        record = {
            "files": {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in files},
            "formats": {key: linear.form.model_dump() for key, linear in linears.items()},
            "in_features": {key: linear.codes.shape[1] for key, linear in linears.items()},
            "note": dict(note),
        }
        write_atomically(self.path / f"{step}.json", json.dumps(record, sort_keys=True).encode())

    def packed(self, step: str, key: str, what: str) -> Tensor:
        """Return ``codes``, ``scales`` or ``zero_points`` of a committed matrix, as packed."""
        with safe_open(self.path / f"{step}.safetensors", framework="pt") as file:
            packed: Tensor = file.get_tensor(f"{key}.{what}").clone()
            return packed

    def tensors(self, step: str) -> dict[str, Tensor]:
        """Return everything that a committed step holds, by name, as stored."""
        with safe_open(self.path / f"{step}.safetensors", framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping

    def linear(self, step: str, key: str) -> QuantizedLinear:
        """Return a committed matrix, unpacked."""
        record = json.loads((self.path / f"{step}.json").read_text(encoding="utf-8"))
        form = Format.model_validate(record["formats"][key])
        packed = {part: self.packed(step, key, part) for part in codec_of(form).parts}
        return QuantizedLinear.unpack(form, packed, record["in_features"][key])

    def formats(self, step: str) -> dict[str, Format]:
        """Return the format of every matrix of a committed step."""
        record = json.loads((self.path / f"{step}.json").read_text(encoding="utf-8"))
        return {key: Format.model_validate(form) for key, form in record["formats"].items()}

    def activations(self, step: str, name: str, shape: tuple[int, int, int], device: torch.device = CPU) -> Activations:
        """Return the stream ``name`` of activations that was committed with ``step``."""
        return Activations(self._activations(step, name), shape, device)

    def has_activations(self, step: str, name: str) -> bool:
        """Return whether activations that were committed with ``step`` are still there."""
        return self._activations(step, name).is_file()

    def drop_activations(self, step: str) -> None:
        """Free the space of activations that no later step reads."""
        for path in self.path.glob(f"{step}.*.activations"):
            path.unlink()

    def scratch(self, name: str, shape: tuple[int, int, int], device: torch.device = CPU) -> Activations:
        """Return activations that belong to no step, but to their last writer; ``drop_scratch`` removes them."""
        return Activations(self._activations(_SCRATCH, name), shape, device)

    def drop_scratch(self) -> None:
        """Free the space of every scratch file, also of those that a killed walk left."""
        self.drop_activations(_SCRATCH)

    def forget(self, step: str) -> None:
        """Undo a commit and free its space; the record goes first, so that a crash leaves no record without files."""
        (self.path / f"{step}.json").unlink(missing_ok=True)
        (self.path / f"{step}.safetensors").unlink(missing_ok=True)
        self.drop_activations(step)

    def forget_pieces(self, step: str) -> None:
        """Undo the commits of pieces of ``step`` (``names.piece_step``), once the whole is committed."""
        for path in sorted(self.path.glob(f"{step}.tap_*.json")):
            self.forget(path.stem)

    def _activations(self, step: str, name: str) -> Path:
        return self.path / f"{step}.{name}.activations"






def _tensors(linears: Mapping[str, QuantizedLinear]) -> dict[str, Tensor]:
    return {
        f"{key}.{part}": tensor.contiguous().cpu()
        for key, linear in linears.items()
        for part, tensor in linear.pack().items()
    }


def _bytes(states: Tensor) -> memoryview:
    return states.contiguous().cpu().numpy().data.cast("B")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # The library wraps the system's message, for example that the disk is full.
        raise OSError(errno.EIO, str(error), str(path)) from error


def _write_stream(path: Path, chunks: Iterator[Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    waiting = 0
    # One chunk is written while the next is computed.
    with partial.open("wb") as file, ThreadPoolExecutor(1) as writer:

        def write(data: memoryview) -> None:
            nonlocal waiting
            file.write(data)
            waiting += len(data)
            # The disk is at work meanwhile, and not only when everything waits for it at the end.
            if waiting >= _SYNCED_BYTES:
                file.flush()
                os.fsync(file.fileno())
                waiting = 0

        written: Future[None] | None = None
        for chunk in chunks:
            if written:
                written.result()
            written = writer.submit(write, _bytes(chunk))
        if written:
            written.result()
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
