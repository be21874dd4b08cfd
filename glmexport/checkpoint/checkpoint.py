"""A checkpoint: files on disk, lazily readable, digested."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.files import contained, files_digest, optional, source_name
from glmexport.checkpoint.header import TensorEntry
from glmexport.checkpoint.index import read_index
from glmexport.checkpoint.shards import Shards
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
        self._shards = Shards(self.shards)
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
        name = DEMO if source == DEMO else source_name(path)
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
        return self._shards.read(self._entry(name), dtype)

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
        return self._shards.read(entry, dtype, slice(start, stop))

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
            self._digest = files_digest(self.path, files, "Digest of the checkpoint", progress)
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
