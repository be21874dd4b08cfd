"""The files of a checkpoint as they were when it was opened: what is written later must be what was read then."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.files import JSON_LIMITS, optional, unreadable, version
from glmexport.tokenizer.tokenizer import tokenizer_files

#: The state of each file: the digest of its content, or of a large one its size, time and inode.
_State = Mapping[Path, object]


@dataclass(frozen=True)
class Snapshot:
    """The state of a directory's files: small ones by their content, weights by size, time of change and inode."""

    directory: Path
    #: Files beside the tokenizer's.
    names: Collection[str]
    small: _State
    weights: _State

    @classmethod
    def take(cls, directory: Path, names: Collection[str]) -> Snapshot:
        """Note the tokenizer's files, those called ``names``, and every safetensors file.

        It is taken before anything is read, so that whatever changes afterwards shows.

        Raises:
            CheckpointError: one of them is a link that leaves the directory.
            MachineError: the machine does not let us read one.
        """
        weights = {path: version(path) for path in directory.glob("*.safetensors") if path.is_file()}
        return cls(directory, names, _small(directory, names), weights)

    def refuse_changes(self, shards: Collection[Path]) -> None:
        """Check that every file is what it was, and that none has appeared or gone.

        Args:
            shards: the weights that count.

        Raises:
            CheckpointError: one is not; names it.
            MachineError: the machine does not let us look.
        """
        now = _small(self.directory, self.names)
        for path in sorted({*self.small, *now}):
            if self.small.get(path) != now.get(path):
                new = "has changed" if path in self.small else "is new"
                raise _changed(path, new if path in now else "is gone")
        for path in sorted(shards):
            if not path.is_file():
                raise _changed(path, "is gone")
            if self.weights.get(path) != version(path):
                raise _changed(path, "has changed")


def _changed(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {how} since the checkpoint was opened, so what was made is of no one checkpoint.",
        next_step="Leave the files as they are while a command runs, and run it again.",
    )


def _small(directory: Path, names: Collection[str]) -> _State:
    present = [optional(directory, name, "the checkpoint") for name in names]
    return {path: _content(path) for path in (*tokenizer_files(directory), *filter(None, present))}


def _content(path: Path) -> object:
    try:
        if path.stat().st_size > JSON_LIMITS.size:
            # None of the kind is so large: what reads it refuses it.
            return version(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
