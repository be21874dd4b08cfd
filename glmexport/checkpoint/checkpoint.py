"""A checkpoint: files on disk, lazily readable, digested."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from glmexport.checkpoint.adapter import Adapter
from glmexport.checkpoint.adapter_config import ADAPTER_CONFIG
from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.files import contained, files_digest, optional, source_name
from glmexport.checkpoint.header import TensorEntry
from glmexport.checkpoint.index import read_index
from glmexport.checkpoint.shards import Shards, is_finite
from glmexport.checkpoint.source import DEMO, refuse_hazards, resolve
from glmexport.checkpoint.tokenizer import tokenizer_files
from glmexport.errors import CheckpointError
from glmexport.progress import Progress

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


class Checkpoint:
    """An opened checkpoint: its files are checked, and no weight is in memory.

    With an adapter it is the checkpoint that merging the two would give; nobody who reads it can tell the difference.

    Attributes:
        path: The directory.
        name: ``demo``, the hub id, or the name of the directory.
        config: ``config.json``.
        generation_config: ``generation_config.json``, or None where there is none.
        shards: The safetensors files of the checkpoint itself, by name.
        tensors: Every tensor by name. Those that the adapter replaces are where the adapter has them.
        adapter: What is merged into the tensors while they are read, or None.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        config: ConfigReader,
        generation_config: ConfigReader | None,
        tensors: Mapping[str, TensorEntry],
        adapter: Adapter | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.config = config
        self.generation_config = generation_config
        self.adapter = adapter
        self.shards = sorted({entry.path for entry in tensors.values()})
        self.tensors = MappingProxyType({**tensors, **(adapter.replaced if adapter else {})})
        self._shards = Shards({*self.shards, *(entry.path for entry in (adapter.entries if adapter else ()))})
        self._digest: str | None = None

    @classmethod
    def open(
        cls, source: str | Path, progress: Progress | None = None, adapter: str | Path | None = None
    ) -> Checkpoint:
        """Resolve ``source`` and check everything that can be checked without reading a weight.

        Args:
            source: ``demo``, a directory, or a hub id; a Path is a directory and nothing else.
            progress: Receives the remarks on files that were left aside.
            adapter: A LoRA adapter to merge into it: a directory, or a hub id; a Path is a directory.

        Raises:
            CheckpointError: there is no such checkpoint or adapter, it is incomplete, damaged or unsafe, or the
                adapter is not one of this checkpoint or of a kind that is not merged here.
            MachineError: the hub cannot be reached, or the machine does not let us read a file.
        """
        path = resolve(source) if isinstance(source, str) else source
        if not path.is_dir():
            raise CheckpointError(f"There is no directory {path}.", next_step="Correct the path.")
        refuse_hazards(path, progress)
        if optional(path, ADAPTER_CONFIG, "the checkpoint") and not optional(path, CONFIG, "the checkpoint"):
            raise CheckpointError(
                f"{path} is an adapter, not a checkpoint.",
                next_step=f"Give the checkpoint that it was trained on, and --adapter {path}.",
            )
        config = ConfigReader.open(contained(path, CONFIG, "every checkpoint"))
        generation_path = optional(path, GENERATION_CONFIG, "the checkpoint")
        generation_config = None if generation_path is None else ConfigReader.open(generation_path)
        name = DEMO if source == DEMO else source_name(path)
        base = cls(path, name, config, generation_config, read_index(path, progress))
        if adapter is None:
            return base
        return cls(path, name, config, generation_config, base.tensors, Adapter.open(adapter, base, progress))

    @property
    def model_type(self) -> str:
        """The family, as ``config.json`` names it."""
        return self.config.text("model_type")

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that are not as the checkpoint's own files have them."""
        return frozenset() if self.adapter is None else frozenset({*self.adapter.replaced, *self.adapter.updates})

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
                finite or does not fit ``dtype`` (the adapter's values and merged ones included), or the file changed
                since it was opened.
            MachineError: the file cannot be read, or there is not enough memory.
        """
        return self._read(self._entry(name), name, dtype, None)

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
        return self._read(entry, name, dtype, slice(start, stop))

    def digest(self, progress: Progress | None = None) -> str:
        """``sha256:`` and the digest of what the checkpoint says, whatever directory it lies in.

        It is the SHA-256 of one line ``NAME\\tBYTES\\tSHA256\\n`` a file, in order of name: the shards,
        ``config.json``, ``generation_config.json``, the tokenizer's files and the chat templates. Files are
        read once; the result is kept. With an adapter it is the SHA-256 of the line ``BASE\\tADAPTER\\n`` of the
        digests of the two.

        Raises:
            CheckpointError: a file vanished.
            MachineError: a file cannot be read.
        """
        if self._digest is None:
            files = {*self.shards, self.path / CONFIG, *tokenizer_files(self.path)}
            if self.generation_config is not None:
                files.add(self.path / GENERATION_CONFIG)
            digest = files_digest(self.path, files, "Digest of the checkpoint", progress)
            if self.adapter is not None:
                both = f"{digest}\t{self.adapter.digest(progress)}\n"
                digest = f"sha256:{hashlib.sha256(both.encode()).hexdigest()}"
            self._digest = digest
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

    def _read(self, entry: TensorEntry, name: str, dtype: torch.dtype | None, rows: slice | None) -> torch.Tensor:
        update = None if self.adapter is None else self.adapter.updates.get(name)
        if update is None:
            return self._shards.read(entry, dtype, rows)
        start, stop = (0, entry.shape[0]) if rows is None else (rows.start, rows.stop)
        merged = update.rows(self._shards, start, stop)
        merged = merged if dtype is None else merged.to(dtype)
        if not is_finite(merged):
            raise CheckpointError(
                f"{update.a.path}: merged into {name!r}, the adapter gives values that are not finite or do not fit "
                f"{str(merged.dtype).removeprefix('torch.')}.",
                next_step="Download the adapter again; if it is the same, the adapter itself is broken.",
            )
        return merged
