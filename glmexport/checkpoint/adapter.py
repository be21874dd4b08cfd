"""A LoRA adapter of PEFT, opened beside its base checkpoint: which tensors it changes, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import TYPE_CHECKING

from glmexport.checkpoint.adapter_config import ADAPTER_CONFIG, MERGE_WITH_PEFT, AdapterConfig
from glmexport.checkpoint.adapter_tensors import assign
from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.header import TensorEntry, read_header
from glmexport.checkpoint.low_rank import LowRank
from glmexport.checkpoint.snapshot import Snapshot
from glmexport.checkpoint.source import refuse_hazards, resolve
from glmexport.foundation.digests import files_digest, forget_digests
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.files import contained, listed, optional, source_name
from glmexport.foundation.progress import Progress
from glmexport.tokenizer.tokenizer import tokenizer_files

if TYPE_CHECKING:
    from glmexport.checkpoint.checkpoint import Checkpoint

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(eq=False)
class Adapter:
    """An opened adapter: every tensor of it has its place in the base, and no weight is in memory.

    Attributes:
        path: The directory.
        name: The hub id, or the name of the directory.
        config: What its tensors mean.
        replaced: Where the tensors are that stand in for a base tensor, by the base's name.
        updates: Low-rank updates, by the name of the base tensor.
        snapshot: Its files as they were when it was opened.
    """

    path: Path
    name: str
    config: AdapterConfig
    replaced: Mapping[str, TensorEntry]
    updates: Mapping[str, LowRank]
    snapshot: Snapshot = field(repr=False)
    _digest: str | None = field(default=None, repr=False)

    @classmethod
    def open(cls, source: str | Path, base: Checkpoint, progress: Progress | None = None) -> Adapter:
        """Open ``source`` and check everything that can be checked without reading a weight.

        Args:
            source: A directory or a hub id; a Path is a directory and nothing else.
            base: The checkpoint that it is merged into.
            progress: Receives remarks on what was left aside.

        Raises:
            CheckpointError: no adapter, of a kind that is not merged here, incomplete, damaged or unsafe, or not one
                of this base; names the file and the tensor.
            MachineError: the hub cannot be reached, or the machine does not let us read a file.
        """
        path = resolve(source) if isinstance(source, str) else source
        if not path.is_dir():
            raise CheckpointError(f"There is no directory {path}.", next_step="Correct the path of the adapter.")
        if optional(path, ADAPTER_CONFIG, "the adapter") is None:
            raise CheckpointError(
                f"{path} is no adapter: it has no {ADAPTER_CONFIG}.",
                next_step="Give a directory that PEFT's save_pretrained wrote"
                + ("; a merged model is a checkpoint: give it alone." if (path / "config.json").is_file() else "."),
            )
        snapshot = Snapshot.take(path, (ADAPTER_CONFIG,))
        refuse_hazards(path, progress)
        reader = ConfigReader.open(contained(path, ADAPTER_CONFIG, "every adapter"))
        config = AdapterConfig.read(ConfigReader(reader.values, reader.where, MERGE_WITH_PEFT))
        tensors = read_header(contained(path, ADAPTER_WEIGHTS, "every adapter"))
        replaced, updates = assign(tensors, config, base.tensors, path / ADAPTER_WEIGHTS)
        adapter = cls(path, source_name(path), config, MappingProxyType(replaced), MappingProxyType(updates), snapshot)
        if progress is not None:
            for remark in adapter._remarks(base):
                progress.remark(remark)
        return adapter

    @property
    def entries(self) -> list[TensorEntry]:
        """The places of all its tensors in its files."""
        return [*self.replaced.values(), *(entry for update in self.updates.values() for entry in update.entries)]

    @property
    def summary(self) -> str:
        """A line that says what the adapter does."""
        ranks = sorted({update.rank for update in self.updates.values()})
        kind = "DoRA" if self.config.dora else "rsLoRA" if self.config.rank_stabilized else "LoRA"
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
        return f"{kind} of {rank}; updated matrices: {len(self.updates)}, replaced tensors: {len(self.replaced)}"

    def digest(self, progress: Progress | None = None) -> str:
        """Return ``sha256:`` and the digest of the adapter's content: its weights and adapter_config.json.

        Raises:
            CheckpointError: a file vanished.
            MachineError: a file cannot be read.
        """
        if self._digest is None:
            self._digest = files_digest(self.path, self._files, "Digest of the adapter", progress)
        return self._digest

    def forget_digest(self) -> None:
        """Have the next digest read every byte; raises as ``Checkpoint.forget_digest`` does."""
        self._digest = None
        forget_digests(self._files)

    @property
    def _files(self) -> tuple[Path, ...]:
        return self.path / ADAPTER_CONFIG, self.path / ADAPTER_WEIGHTS

    def refuse_changes(self) -> None:
        """Check that its files are what they were; raises as ``Checkpoint.refuse_changes`` does."""
        self.snapshot.refuse_changes([self.path / ADAPTER_WEIGHTS])

    def _remarks(self, base: Checkpoint) -> Iterator[str]:
        trained_on, given = self.config.base, {base.path.resolve().name, base.name.rpartition("/")[2]}
        # It can be a path of any system, and the name in it is all that two machines can agree on.
        if trained_on and PureWindowsPath(trained_on).name.lower() not in {name.lower() for name in given}:
            yield f"The adapter {self.name} was trained on {trained_on!r}, and is merged into {base.name!r}."
        if self.config.fan_in_fan_out:
            yield "fan_in_fan_out of the adapter is left aside, as PEFT does: no linear of these models is transposed."
        matrices = (key.removesuffix(".weight") for key, entry in base.tensors.items() if len(entry.shape) == 2)
        untouched = [
            module
            for module in matrices
            if isinstance(self.config.target_modules, tuple)
            and self.config.targets(module)
            and f"{module}.weight" not in self.updates
        ]
        if untouched:
            yield (
                f"The adapter's target_modules name {listed(untouched)}, for which it has no tensors; "
                "what they name stays as it is."
            )
        own = [path for path in tokenizer_files(self.path) if not _same(path, base.path / path.relative_to(self.path))]
        if own:
            names = ", ".join(path.name for path in own)
            yield f"Ignored in {self.path}: {names}; the tokenizer and the chat template are those of {base.path}."


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()
