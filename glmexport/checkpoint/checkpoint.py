"""A checkpoint: files on disk, lazily readable, digested."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.derived import DerivedMatrix, packed_weights, stack
from glmexport.checkpoint.files import cache_repository, contained, optional, unreadable
from glmexport.checkpoint.gptq import QUANTIZE_CONFIG, GptqFormat, read_settings
from glmexport.checkpoint.header import WEIGHT_DTYPES, TensorEntry
from glmexport.checkpoint.index import read_index
from glmexport.checkpoint.packed import Codes, PackedMatrix, find_matrices
from glmexport.checkpoint.reading import reading
from glmexport.checkpoint.source import DEMO, refuse_hazards, resolve
from glmexport.checkpoint.tokenizer import tokenizer_files
from glmexport.errors import CheckpointError
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
        tensors: Every tensor by name. A matrix that is stored in the GPTQ format is listed as the weight that it
            stands for, with the dtype ``GPTQ``, and what it is packed into is not listed.
        quantized: Stored format of every such matrix, by the name of its weight; empty for full precision.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        config: ConfigReader,
        generation_config: ConfigReader | None,
        tensors: Mapping[str, TensorEntry],
        derived: Mapping[str, DerivedMatrix] | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.config = config
        self.generation_config = generation_config
        self._plain = dict(tensors)
        self._derived = dict(derived or {})
        self.tensors = MappingProxyType(self._plain | {name: matrix.entry for name, matrix in self._derived.items()})
        self.quantized: Mapping[str, GptqFormat] = MappingProxyType(
            {name: matrix.form for name, matrix in self._derived.items() if matrix.form}
        )
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
        tensors = read_index(path, progress)
        settings = read_settings(path, config)
        matrices = find_matrices(tensors, settings, path)
        packed = {entry.name for matrix in matrices.values() for entry in matrix.entries}
        plain = {key: entry for key, entry in tensors.items() if key not in packed}
        return cls(path, name, config, generation_config, plain, packed_weights(matrices))

    def stacked(self, stacks: Mapping[str, Sequence[str]]) -> Checkpoint:
        """The same checkpoint with matrices in place of the ones that hold their rows.

        Args:
            stacks: Name of a matrix, and the names of those whose rows are its rows, in order. Where the
                checkpoint has the matrix itself, or lacks one of the others, it is left as it is.

        Raises:
            CheckpointError: the others differ in width or in how they are stored.
        """
        plain, derived = dict(self._plain), dict(self._derived)
        for name, parts in stacks.items():
            if name not in self.tensors and all(part in self.tensors for part in parts):
                sources = [derived.pop(part) if part in derived else plain.pop(part) for part in parts]
                derived[name] = stack(name, sources)
        return Checkpoint(self.path, self.name, self.config, self.generation_config, plain, derived)

    @property
    def model_type(self) -> str:
        """The family, as ``config.json`` names it."""
        return self.config.text("model_type")

    @property
    def shards(self) -> list[Path]:
        """The safetensors files that hold the tensors, by name."""
        derived = (entry for matrix in self._derived.values() for entry in matrix.stored)
        return sorted({entry.path for entry in (*self._plain.values(), *derived)})

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
        if name in self._derived:
            return self._derive(self._derived[name], dtype, 0, self.shape(name)[0])
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
        if name in self._derived:
            return self._derive(self._derived[name], dtype, start, stop)
        return self._read(entry, dtype, slice(start, stop))

    def codes(self, name: str, start: int, stop: int) -> Codes:
        """Rows ``[start, stop)`` of a matrix of ``quantized``, as its format stores them.

        Raises:
            CheckpointError: the stored values cannot be used, or the file changed since it was opened.
            MachineError: the file cannot be read, or there is not enough memory.
        """
        import torch

        decoded = []
        for part, begin, end in self._derived[name].slabs(start, stop):
            assert isinstance(part, PackedMatrix)
            self._refuse_changed(*part.entries)
            decoded.append(part.decode(begin, end))
        return Codes(*(torch.cat([getattr(rows, field) for rows in decoded]) for field in vars(decoded[0])))

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
            if self.quantized and (self.path / QUANTIZE_CONFIG).is_file():
                files.add(self.path / QUANTIZE_CONFIG)
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

    def _derive(self, matrix: DerivedMatrix, dtype: torch.dtype | None, start: int, stop: int) -> torch.Tensor:
        import torch

        rows = torch.empty(stop - start, matrix.entry.shape[1], dtype=dtype or torch.float32)
        filled = 0
        for part, begin, end in matrix.slabs(start, stop):
            if isinstance(part, PackedMatrix):
                self._refuse_changed(*part.entries)
                slab = part.dequantize(begin, end)
            else:
                slab = self._read(part, dtype, slice(begin, end))
            rows[filled : filled + len(slab)] = slab
            filled += len(slab)
        return rows

    def _read(self, entry: TensorEntry, dtype: torch.dtype | None, rows: slice | None) -> torch.Tensor:
        import torch
        from safetensors import safe_open

        if entry.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name!r} is stored as {entry.dtype}; "
                f"accepted are {', '.join(WEIGHT_DTYPES)}.",
                next_step="Use the full-precision checkpoint of this model.",
            )
        self._refuse_changed(entry)
        # Closed after every read: pages of a file that stays mapped count as memory of this process.
        with reading(entry), safe_open(entry.path, framework="pt", device="cpu") as shard:
            stored = shard.get_tensor(entry.name) if rows is None else shard.get_slice(entry.name)[rows]
            tensor: torch.Tensor = stored.to(dtype or torch.float32, copy=True, memory_format=torch.contiguous_format)
            if not _is_finite(tensor):
                raise _not_finite(entry, stored, tensor, 0 if rows is None else rows.start)
            return tensor

    def _refuse_changed(self, *entries: TensorEntry) -> None:
        for path in {entry.path for entry in entries}:
            if _version(path) != self._versions[path]:
                raise CheckpointError(
                    f"{path} changed since the checkpoint was opened.",
                    next_step="Wait until the download is complete, then run the command again.",
                )


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
