"""A checkpoint: files on disk, lazily readable, digested."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.files import cache_repository, contained, optional, unreadable
from glmexport.checkpoint.header import WEIGHT_DTYPES, TensorEntry
from glmexport.checkpoint.index import read_index
from glmexport.checkpoint.source import DEMO, refuse_hazards, resolve
from glmexport.checkpoint.tokenizer import tokenizer_files
from glmexport.errors import CheckpointError, MachineError
from glmexport.progress import Progress, Silent, Track

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

_CHUNK_BYTES = 8 * 2**20
_CHUNK_ELEMENTS = 2**24


class Checkpoint:
    """An opened checkpoint: its files are checked, and no weight is in memory.

    Attributes:
        path: The directory.
        name: ``demo``, the hub id, or the name of the directory.
        config: ``config.json``.
        generation_config: ``generation_config.json``, or None where there is none.
        tensors: Every tensor by name.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        config: ConfigReader,
        generation_config: ConfigReader | None,
        tensors: Mapping[str, TensorEntry],
    ) -> None:
        self.path = path
        self.name = name
        self.config = config
        self.generation_config = generation_config
        self.tensors = MappingProxyType(dict(tensors))
        # The headers were checked for these versions; reading a mapped file that shrank kills the process.
        self._versions = {shard: _version(shard) for shard in self.shards}
        self._digest: str | None = None

    @classmethod
    def open(cls, source: str | Path, progress: Progress | None = None) -> Checkpoint:
        """Resolve ``source`` and check everything that can be checked without reading a weight.

        Args:
            source: ``demo``, a directory, or a hub id; a Path is a directory and nothing else.
            progress: Receives the remarks on files that were left aside.

        Raises:
            CheckpointError: there is no such checkpoint, or it is incomplete, damaged or unsafe.
            MachineError: the hub cannot be reached, or the machine does not let us read a file.
        """
        path = resolve(source) if isinstance(source, str) else source
        if not path.is_dir():
            raise CheckpointError(f"There is no directory {path}.", next_step="Correct the path.")
        refuse_hazards(path, progress)
        config = ConfigReader.open(contained(path, CONFIG, "every checkpoint"))
        generation_path = optional(path, GENERATION_CONFIG, "the checkpoint")
        generation_config = None if generation_path is None else ConfigReader.open(generation_path)
        name = DEMO if source == DEMO else _name(path)
        return cls(path, name, config, generation_config, read_index(path, progress))

    @property
    def model_type(self) -> str:
        """The family, as ``config.json`` names it."""
        return self.config.text("model_type")

    @property
    def shards(self) -> list[Path]:
        """The safetensors files that hold the tensors, by name."""
        return sorted({entry.path for entry in self.tensors.values()})

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(entry.elements for entry in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Size of all tensors as stored."""
        return sum(entry.bytes for entry in self.tensors.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        return self._entry(name).shape

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A whole tensor, converted, in memory of its own: nothing of the file stays mapped.

        Args:
            name: Its name in the checkpoint.
            dtype: Floating-point type of the result; None is float32.

        Returns:
            Contiguous, of the stored shape, with every value finite.

        Raises:
            CheckpointError: there is none of that name, it is not stored as F32, F16 or BF16, a value is not
                finite or does not fit ``dtype``, or the file changed since it was opened.
            MachineError: the file cannot be read, or there is not enough memory.
        """
        return self._read(self._entry(name), dtype, None)

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``[start, stop)`` of the first axis, read without the others; otherwise as ``read``.

        Returns:
            Contiguous, of shape ``(stop - start, *shape[1:])``.

        Raises:
            CheckpointError: as ``read``.
            MachineError: as ``read``.
            ValueError: the tensor is a scalar, or the rows are not all inside its first axis.
        """
        entry = self._entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise ValueError(f"rows [{start}, {stop}) of {name!r}, whose shape is {entry.shape}")
        return self._read(entry, dtype, slice(start, stop))

    def digest(self, progress: Progress | None = None) -> str:
        """``sha256:`` and the digest of what the checkpoint says, whatever directory it lies in.

        It is the SHA-256 of one line ``NAME\\tBYTES\\tSHA256\\n`` a file, in order of name: the shards,
        ``config.json``, ``generation_config.json``, the tokenizer's files and the chat templates. Files are
        read once; the result is kept.

        Raises:
            CheckpointError: a file vanished.
            MachineError: a file cannot be read.
        """
        if self._digest is None:
            files = {*self.shards, self.path / CONFIG, *tokenizer_files(self.path)}
            if self.generation_config is not None:
                files.add(self.path / GENERATION_CONFIG)
            named = sorted((path.relative_to(self.path).as_posix(), path) for path in files)
            total = sum(_version(path)[0] for _, path in named)
            lines = hashlib.sha256()
            with (progress or Silent()).track("Digest of the checkpoint", total) as track:
                for name, path in named:
                    size, digest = _sha256(path, name, track)
                    lines.update(f"{name}\t{size}\t{digest}\n".encode())
            self._digest = f"sha256:{lines.hexdigest()}"
        return self._digest

    def _entry(self, name: str) -> TensorEntry:
        if name in self.tensors:
            return self.tensors[name]
        nearest = difflib.get_close_matches(name, self.tensors, n=1)
        raise CheckpointError(
            f"{self.path} has no tensor {name!r}.",
            next_step=(f"Did you mean {nearest[0]!r}? " if nearest else "")
            + "If the name is right, the checkpoint is incomplete: download it again.",
        )

    def _read(self, entry: TensorEntry, dtype: torch.dtype | None, rows: slice | None) -> torch.Tensor:
        import torch
        from safetensors import SafetensorError, safe_open

        if entry.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name!r} is stored as {entry.dtype}; "
                f"accepted are {', '.join(WEIGHT_DTYPES)}.",
                next_step="Use the full-precision checkpoint of this model.",
            )
        if _version(entry.path) != self._versions[entry.path]:
            raise CheckpointError(
                f"{entry.path} changed since the checkpoint was opened.",
                next_step="Wait until the download is complete, then run the command again.",
            )
        try:
            # Closed after every read: pages of a file that stays mapped count as memory of this process.
            with safe_open(entry.path, framework="pt", device="cpu") as shard:
                stored = shard.get_tensor(entry.name) if rows is None else shard.get_slice(entry.name)[rows]
                tensor: torch.Tensor = stored.to(
                    dtype or torch.float32, copy=True, memory_format=torch.contiguous_format
                )
                if not _is_finite(tensor):
                    raise _not_finite(entry, stored, tensor, 0 if rows is None else rows.start)
                return tensor
        except SafetensorError as error:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name!r} cannot be read: {error}.",
                next_step="Download the shard again.",
            ) from error
        except OSError as error:
            raise unreadable(entry.path, error) from error
        except (MemoryError, RuntimeError) as error:
            # torch has no class of its own for a failed allocation or mapping on the CPU.
            if isinstance(error, RuntimeError) and not re.search("memory|mmap", str(error)):
                raise
            raise MachineError(
                f"Not enough memory for tensor {entry.name!r} of {entry.path} ({entry.elements:,} elements).",
                next_step="Close other programs or use a machine with more memory.",
            ) from error


def _name(path: Path) -> str:
    repository = cache_repository(path.resolve())
    return path.resolve().name if repository is None else repository.name.removeprefix("models--").replace("--", "/", 1)


def _version(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return status.st_size, status.st_mtime_ns


def _sha256(path: Path, name: str, track: Track) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                track.advance(len(chunk), name)
    except OSError as error:
        raise unreadable(path, error) from error
    return size, digest.hexdigest()


def _is_finite(tensor: torch.Tensor) -> bool:
    # The extremes carry every NaN and infinity with them, without the full-size masks that isfinite makes.
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _not_finite(entry: TensorEntry, stored: torch.Tensor, tensor: torch.Tensor, first_row: int) -> CheckpointError:
    count, first = 0, -1
    flat = tensor.flatten()
    for begin in range(0, flat.numel(), _CHUNK_ELEMENTS):
        bad = flat[begin : begin + _CHUNK_ELEMENTS].isfinite().logical_not()
        if first < 0 and bool(bad.any()):
            first = begin + int(bad.int().argmax())
        count += int(bad.sum())
    index = []
    for size in reversed(tensor.shape):
        first, position = divmod(first, size)
        index.append(position)
    index.reverse()
    if index:
        index[0] += first_row
    where = f"{entry.path}: tensor {entry.name!r}"
    if _is_finite(stored):
        target = str(tensor.dtype).removeprefix("torch.")
        return CheckpointError(
            f"{where} has {count:,} values too large for {target}, the first at {index}.",
            next_step="Read it as float32.",
        )
    return CheckpointError(
        f"{where} has {count:,} values that are not finite, the first at {index}.",
        next_step="Download the shard again; if it is the same, the checkpoint itself is broken.",
    )
