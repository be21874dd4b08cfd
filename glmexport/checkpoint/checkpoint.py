"""A checkpoint: files on disk, lazily readable, digested."""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from glmexport.checkpoint.adapter import Adapter
from glmexport.checkpoint.adapter_config import refuse_adapter
from glmexport.checkpoint.codes import CodedMatrix, CodeFormat, Codes
from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.derived import DerivedMatrix, stack
from glmexport.checkpoint.fold import Fold
from glmexport.checkpoint.header import TensorEntry
from glmexport.checkpoint.index import read_index
from glmexport.checkpoint.layouts import SETTINGS_FILES, refuse_gguf
from glmexport.checkpoint.parts import StackedMatrix
from glmexport.checkpoint.shards import Shards, is_finite
from glmexport.checkpoint.snapshot import Snapshot
from glmexport.checkpoint.source import DEMO, refuse_hazards, resolve
from glmexport.checkpoint.stored_weights import StoredWeights
from glmexport.foundation.digests import files_digest, forget_digests
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.files import contained, optional, source_name
from glmexport.foundation.progress import Progress
from glmexport.tokenizer.tokenizer import tokenizer_files

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
        tensors: Every tensor by name. Those that the adapter replaces are where the adapter has them. A matrix that
            is stored quantized is listed as the weight that it stands for, with the dtype ``GPTQ`` for one in that
            format, and what it is packed into is not listed.
        quantized: Stored format of every matrix whose codes a bundle can keep, by the name of its weight.
        stored: How the checkpoint's own files are quantized.
        absent: Names that the index gives and no file has.
        adapter: What is merged into the tensors while they are read, or None.
        folds: Scales that are moved between tensors while they are read, by the name of the tensor.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        config: ConfigReader,
        generation_config: ConfigReader | None,
        tensors: Mapping[str, TensorEntry],
        adapter: Adapter | None = None,
        derived: Mapping[str, DerivedMatrix] | None = None,
        absent: frozenset[str] = frozenset(),
        stored: StoredWeights | None = None,
        *,
        snapshot: Snapshot,
    ) -> None:
        self.path = path
        self.name = name
        self.config = config
        self.generation_config = generation_config
        self.adapter = adapter
        self._snapshot = snapshot
        self.absent = absent
        self.stored = stored or StoredWeights()
        self._plain = dict(tensors)
        self._derived = dict(derived or {})
        inside = [entry for matrix in self._derived.values() for entry in matrix.stored]
        own = {entry.path for entry in (*self._plain.values(), *inside)}
        self.shards = sorted(own - {entry.path for entry in (adapter.replaced.values() if adapter else ())})
        listed = {name: matrix.entry for name, matrix in self._derived.items()}
        # What an adapter replaces may be part of a derived matrix by now.
        replaced = {key: entry for key, entry in (adapter.replaced if adapter else {}).items() if key in self._plain}
        self.tensors = MappingProxyType({**self._plain, **listed, **replaced})
        self.quantized: Mapping[str, CodeFormat] = MappingProxyType(
            {name: matrix.form for name, matrix in self._derived.items() if matrix.form}
        )
        self._shards = Shards({*self.shards, *(entry.path for entry in (adapter.entries if adapter else ()))})
        self._digest: str | None = None
        self.folds: Mapping[str, Fold] = MappingProxyType({})

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
        snapshot = Snapshot.take(path, (CONFIG, GENERATION_CONFIG, *SETTINGS_FILES))
        refuse_adapter(path)
        refuse_hazards(path, progress)
        refuse_gguf(path)
        config = ConfigReader.open(contained(path, CONFIG, "every checkpoint"))
        generation_path = optional(path, GENERATION_CONFIG, "the checkpoint")
        generation_config = None if generation_path is None else ConfigReader.open(generation_path)
        name = DEMO if source == DEMO else source_name(path)
        tensors, absent = read_index(path, progress)
        stored = StoredWeights.find(path, config, tensors, progress)
        inside = {entry.name for matrix in stored.matrices.values() for entry in matrix.stored} | stored.aside
        plain = {key: entry for key, entry in tensors.items() if key not in inside}
        base = cls(
            path, name, config, generation_config, plain, None, stored.matrices, absent, stored, snapshot=snapshot
        )
        if adapter is None:
            return base
        if stored.matrices:
            raise CheckpointError(
                f"{name} is quantized, and codes cannot take up the adapter {adapter}.",
                next_step="Give the full-precision checkpoint that the adapter was trained on.",
            )
        merged = Adapter.open(adapter, base, progress)
        return cls(path, name, config, generation_config, base.tensors, merged, absent=absent, snapshot=snapshot)

    def stacked(
        self, stacks: Mapping[str, Sequence[str]], pages: Mapping[str, tuple[str, int]] | None = None
    ) -> Checkpoint:
        """Return the checkpoint with matrices in place of the ones that hold their rows, and of stacks of matrices.

        Args:
            stacks: Name of a matrix, and the names of those whose rows are its rows, in order. Where the
                checkpoint has the matrix itself, or lacks one of the others, it is left as it is.
            pages: Name of a matrix, and that of the tensor [count, rows, columns] it is in, with its place there.

        Raises:
            CheckpointError: the others differ in width or in how they are stored.
        """
        plain, derived = dict(self._plain), dict(self._derived)
        for name, parts in stacks.items():
            if name not in self.tensors and all(part in self.tensors for part in parts):
                derived[name] = stack(name, [derived.get(part, self.tensors[part]) for part in parts])
                for part in parts:
                    (derived if part in derived else plain).pop(part)
        for name, (whole, index) in (pages or {}).items():
            entry = self.tensors.get(whole)
            if name not in self.tensors and entry is not None and len(entry.shape) == 3 and index < entry.shape[0]:
                plain.pop(whole, None)
                derived[name] = DerivedMatrix(name, (StackedMatrix(entry, index),))
        return Checkpoint(
            self.path,
            self.name,
            self.config,
            self.generation_config,
            plain,
            self.adapter,
            derived,
            self.absent,
            self.stored,
            snapshot=self._snapshot,
        )

    def folded(self, folds: Mapping[str, Fold]) -> Checkpoint:
        """Return the checkpoint with scales moved between its tensors, by name; its digest stays that of the files."""
        changed = copy.copy(self)
        changed.folds = MappingProxyType(dict(folds))
        return changed

    def configured(self, config: ConfigReader) -> Checkpoint:
        """Return the checkpoint with ``config``, another reading of the same file."""
        changed = copy.copy(self)
        changed.config = config
        return changed

    def without_adapter(self) -> Checkpoint:
        """Return the checkpoint as its own files have it, or itself where nothing is merged into it."""
        if self.adapter is None:
            return self
        return Checkpoint(
            self.path,
            self.name,
            self.config,
            self.generation_config,
            self._plain,
            derived=self._derived,
            absent=self.absent,
            stored=self.stored,
            snapshot=self._snapshot,
        )

    @property
    def model_type(self) -> str:
        """The family, as ``config.json`` names it."""
        return self.config.text("model_type")

    @property
    def changed(self) -> frozenset[str]:
        """The names of the tensors that are not as the checkpoint's own files have them."""
        return frozenset() if self.adapter is None else frozenset({*self.adapter.replaced, *self.adapter.updates})

    @property
    def derived(self) -> frozenset[str]:
        """The names of the matrices that no single tensor of the files holds."""
        return frozenset(self._derived)

    @property
    def coded(self) -> bool:
        """Whether the checkpoint's own files hold integer codes, which a bundle keeps if it can."""
        return self.stored.inexact is not None or bool(self.quantized)

    @property
    def labels(self) -> dict[str, str]:
        """The short names of what quantized matrices are stored as, by the name of their weight."""
        return {name: "+".join(sorted(matrix.labels)) for name, matrix in self._derived.items() if matrix.labels}

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(entry.elements for entry in self.tensors.values())

    @property
    def bytes(self) -> int:
        """The size of all tensors as stored."""
        return sum(entry.bytes for entry in self.tensors.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        return self._entry(name).shape

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read a whole tensor, converted, in memory of its own: nothing of the file stays mapped.

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
        entry = self._entry(name)
        if name in self._derived:
            return self._folded(name, self._derive(self._derived[name], dtype, 0, entry.shape[0]))
        return self._folded(name, self._read(entry, name, dtype, None))

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read rows ``[start, stop)`` of the first axis without the others; otherwise as ``read``.

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
            return self._folded(name, self._derive(self._derived[name], dtype, start, stop), start)
        return self._folded(name, self._read(entry, name, dtype, slice(start, stop)), start)

    def codes(self, name: str, start: int, stop: int) -> Codes:
        """Read rows ``[start, stop)`` of a matrix of ``quantized``, as its format stores them.

        Raises:
            CheckpointError: the stored values cannot be used, or the file changed since it was opened.
            MachineError: the file cannot be read, or there is not enough memory.
        """
        decoded = []
        for part, begin, end in self._derived[name].slabs(start, stop):
            assert isinstance(part, CodedMatrix)
            decoded.append(part.read_codes(self._shards, begin, end))
        return Codes.concatenate(decoded)

    def digest(self, progress: Progress | None = None) -> str:
        """Return ``sha256:`` and the digest of the checkpoint's content, whatever directory it lies in.

        It is the SHA-256 of one line ``NAME\\tBYTES\\tSHA256\\n`` a file, in order of name: the shards,
        ``config.json``, ``generation_config.json``, the tokenizer's files and the chat templates, and of a quantized
        checkpoint the files beside config.json that say how. Files are read once; the result is kept, and what a
        shard gives is kept between commands (see ``foundation/digests``). With an adapter it is the SHA-256 of the
        line ``BASE\\tADAPTER\\n`` of the digests of the two.

        Raises:
            CheckpointError: a file changed since the checkpoint was opened, or vanished.
            MachineError: a file cannot be read.
        """
        if self._digest is None:
            digest = files_digest(self.path, self._files(), "Digest of the checkpoint", progress)
            if self.adapter is not None:
                both = f"{digest}\t{self.adapter.digest(progress)}\n"
                digest = f"sha256:{hashlib.sha256(both.encode()).hexdigest()}"
            self.refuse_changes()
            self._digest = digest
        return self._digest

    def forget_digest(self) -> None:
        """Have the next digest read every byte, whatever is kept of an earlier one.

        Raises:
            MachineError: what is kept cannot be removed.
        """
        self._digest = None
        forget_digests(self._files())
        if self.adapter is not None:
            self.adapter.forget_digest()

    def refuse_changes(self) -> None:
        """Check that its files, and those of its adapter, are what they were when it was opened.

        What is written of a checkpoint has its digest on it: whatever writes checks this last.

        Raises:
            CheckpointError: one is not; names it.
            MachineError: the machine does not let us look.
        """
        self._snapshot.refuse_changes(self.shards)
        if self.adapter is not None:
            self.adapter.refuse_changes()

    def _files(self) -> set[Path]:
        """Return the files that the digest is of."""
        files = {*self.shards, self.path / CONFIG, *tokenizer_files(self.path)}
        if self.generation_config is not None:
            files.add(self.path / GENERATION_CONFIG)
        if self.stored.layout:
            files |= {self.path / name for name in SETTINGS_FILES if (self.path / name).is_file()}
        return files

    def _entry(self, name: str) -> TensorEntry:
        if name in self.tensors:
            return self.tensors[name]
        nearest = difflib.get_close_matches(name, self.tensors, n=1)
        raise CheckpointError(
            f"{self.path} has no tensor {name!r}.",
            next_step=(f"Did you mean {nearest[0]!r}? " if nearest else "")
            + "If the name is right, the checkpoint is incomplete: download it again.",
        )

    def _folded(self, name: str, values: torch.Tensor, start: int = 0) -> torch.Tensor:
        fold = self.folds.get(name)
        return values if fold is None else fold.apply(values, start)

    def _derive(self, matrix: DerivedMatrix, dtype: torch.dtype | None, start: int, stop: int) -> torch.Tensor:
        import torch

        rows = torch.empty(stop - start, matrix.entry.shape[1], dtype=dtype or torch.float32)
        filled = 0
        for part, begin, end in matrix.slabs(start, stop):
            if isinstance(part, TensorEntry):
                slab = self._read(part, part.name, dtype, slice(begin, end))
            else:
                slab = part.read(self._shards, begin, end)
            rows[filled : filled + len(slab)] = slab
            filled += len(slab)
        return rows

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
