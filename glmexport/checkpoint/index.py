"""The tensors of a checkpoint and their shards: shards, headers and index checked with each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from glmexport.checkpoint.header import TensorEntry, read_header
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.files import contained, optional, read_json, refuse_escape
from glmexport.foundation.progress import Progress

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")
_AGAIN = "Download the checkpoint again; files already complete are kept."


class StoredTensors(NamedTuple):
    """The tensors that the files hold, and the names that only the index has."""

    #: Every tensor by name, in order of shard and of its data there.
    tensors: dict[str, TensorEntry]
    #: Names that the index gives and no file has.
    absent: frozenset[str]


def read_index(directory: Path, progress: Progress | None = None) -> StoredTensors:
    """Return every tensor of the checkpoint.

    The weights are those of the shards that ``model.safetensors.index.json`` names; without it
    ``model.safetensors``; without that every ``*.safetensors``. As in transformers the shards themselves tell which
    tensors they have; an index that tells otherwise earns a remark, as safetensors left aside do. Whether a name
    without a tensor matters is for those to say who know what the model needs.

    Raises:
        CheckpointError: no weights, a shard missing, a damaged shard, a tensor in two shards, an index that is none
            or leaves the directory, or an index beside a ``model.safetensors`` that it does not name.
        MachineError: the machine does not let us read a file.
    """
    present = sorted(path.name for path in directory.iterdir() if path.name.endswith(".safetensors"))
    index = optional(directory, INDEX, "the checkpoint")
    if index is not None:
        promised = _weight_map(index)
        names = sorted(set(promised.values()))
        if SINGLE in present and SINGLE not in names:
            raise CheckpointError(
                f"{directory} has two sets of weights: {SINGLE}, and the shards that {INDEX} names.",
                next_step="Remove the one that is not meant.",
            )
        _check_present(index, names)
        tensors = _tensors(directory, names, str(index))
        absent = frozenset(promised) - set(tensors)
        if progress is not None and (told := _disagreement(index, promised, tensors)):
            progress.remark(told)
    else:
        absent = frozenset()
        names = [SINGLE] if SINGLE in present else present
        if not names:
            raise CheckpointError(
                f"{directory} has no weights: no *.safetensors file is in it.",
                next_step="Give the directory of a complete checkpoint in the safetensors format.",
            )
        _check_numbering(directory, names)
        tensors = _tensors(directory, names, str(directory))
    aside = [name for name in present if name not in names]
    if aside and progress is not None:
        progress.remark(f"Ignored in {directory}: {', '.join(aside)}; the checkpoint's weights are elsewhere.")
    return StoredTensors(tensors, absent)


def _weight_map(path: Path) -> dict[str, str]:
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{path} has no weight_map.", next_step=_AGAIN)
    for tensor, shard in table.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} places tensor {tensor!r} in {shard!r}, which is no safetensors file.",
                next_step=_AGAIN,
            )
    return table


def _check_present(index: Path, names: list[str]) -> None:
    # A download that stopped is the common case, so it is told as a count and not shard by shard.
    for name in names:
        refuse_escape(index.parent, name, str(index))
    absent = [name for name in names if not (index.parent / name).exists()]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise CheckpointError(
            f"{len(absent)} of {len(names)} shards that {index} names are missing: {', '.join(absent[:3])}{more}.",
            next_step=_AGAIN,
        )


def _check_numbering(directory: Path, names: list[str]) -> None:
    """Check the names of numbered shards: without an index, they are the only evidence that none is missing."""
    for match in filter(None, map(_NUMBERED.fullmatch, names)):
        stem, digits, total = match["stem"], len(match["number"]), match["total"]
        # Stops at the first gap, so that a hostile total costs nothing.
        for number in range(1, int(total) + 1):
            expected = f"{stem}-{number:0{digits}d}-of-{total}.safetensors"
            if expected not in names:
                raise CheckpointError(f"{directory / expected} is missing.", next_step=_AGAIN)


def _tensors(directory: Path, names: list[str], named_by: str) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for name in names:
        for tensor, entry in read_header(contained(directory, name, named_by)).items():
            if tensor in tensors:
                raise CheckpointError(
                    f"Tensor {tensor!r} is in two shards: {tensors[tensor].path} and {entry.path}.",
                    next_step="Remove the shard that does not belong to the checkpoint.",
                )
            tensors[tensor] = entry
    return tensors


def _disagreement(index: Path, promised: dict[str, str], tensors: dict[str, TensorEntry]) -> str | None:
    """A remark on an index that is not that of its shards; None where it is."""
    absent = [f"{name} is in no file" for name in promised if name not in tensors]
    elsewhere = [
        f"{name} is in {tensors[name].path.name}"
        for name, shard in promised.items()
        if name in tensors and tensors[name].path != index.parent / shard
    ]
    unnamed = [f"{name} of {entry.path.name} is not named" for name, entry in tensors.items() if name not in promised]
    wrong = [*absent, *elsewhere, *unnamed]
    if not wrong:
        return None
    more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{index} is not the index of these shards: {', '.join(wrong[:3])}{more}. The shards are believed."
