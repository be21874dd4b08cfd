"""Finished pieces of a validation: kept in the work directory, and shared by ranks.

A piece is a deterministic function of what its name says and of the job. A validation that was interrupted reads the
pieces that are there and computes the others. Each is computed whole by the rank that owns it, and all ranks get it, so
that whoever adds them up does so in one order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from glmexport.quantization.ranks import ALONE, Parcel, Ranks
from glmexport.quantization.store import WorkDirectory

_DIGEST_BYTES = 32
_FACTS = "facts"

#: A function that computes the pieces with these indices, and yields each with its index once it is finished.
Compute = Callable[[Sequence[int]], Iterator[tuple[int, Parcel]]]


@dataclass(frozen=True)
class Pieces:
    """The pieces of one job, which ``ranks`` share.

    ``job`` is everything that all pieces depend on; JSON can hold it, and every name. Without a ``directory`` nothing
    is kept.
    """

    directory: Path | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    ranks: Ranks = ALONE

    def each(self, kind: str, names: Sequence[Any], compute: Compute) -> list[Parcel]:
        """Return the pieces of ``kind`` by their ``names``, on every rank; each computes those it owns and has not.

        Piece i belongs to rank i mod size. ``compute`` must not wait for other ranks.
        """
        own = self.ranks.own(range(len(names)))
        found = {index: kept for index in own if (kept := self.load(kind, names[index])) is not None}
        absent = [index for index in own if index not in found]
        if absent:
            for index, parcel in compute(absent):
                self.save(kind, names[index], parcel)
                found[index] = parcel
        return [parcel for _, parcel in self.ranks.each(range(len(names)), found.__getitem__)]

    def one(self, kind: str, name: Any, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` gives on rank 0 as the piece of that ``name``; JSON can hold it."""
        (parcel,) = self.each(kind, [name], lambda _: iter([(0, Parcel(facts=compute()))]))
        return parcel.facts

    def load(self, kind: str, name: Any) -> Parcel | None:
        """Return a piece; None if it is not there, is damaged, or is another."""
        if self.directory is None:
            return None
        identity = self._identity(kind, name)
        try:
            content = self._path(kind, identity).read_bytes()
        except OSError:
            return None
        digest, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            return None
        tensors = load(content)
        noted = json.loads(tensors.pop(_FACTS).numpy().tobytes())
        if noted["identity"] != identity:
            return None
        return Parcel(tuple(tensors.get(str(place)) for place in range(noted["tensors"])), noted["facts"])

    def save(self, kind: str, name: Any, parcel: Parcel) -> None:
        """Keep a piece: whoever reads it, or a crash, finds all of it or nothing.

        Nothing waits for the disk, as a piece that did not come to it is known by its digest.
        """
        if self.directory is None:
            return
        identity = self._identity(kind, name)
        noted = {"identity": identity, "tensors": len(parcel.tensors), "facts": parcel.facts}
        tensors = {str(place): tensor for place, tensor in enumerate(parcel.tensors) if tensor is not None}
        tensors[_FACTS] = torch.frombuffer(bytearray(json.dumps(noted).encode()), dtype=torch.uint8)
        content = save(tensors)
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(kind, identity)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
        partial.replace(path)

    def drop(self, kind: str, name: Any) -> None:
        """Remove a piece that nothing reads any more."""
        if self.directory is not None:
            self._path(kind, self._identity(kind, name)).unlink(missing_ok=True)

    def walk(self, kind: str, name: Any) -> WorkDirectory | None:
        """Return where this rank commits a pass through the blocks that is under way; None if nothing is kept."""
        if self.directory is None:
            return None
        identity = self._identity(kind, name)
        return WorkDirectory(self.directory / f"{kind}-{identity}", {"identity": identity})

    def drop_walk(self, kind: str, name: Any) -> None:
        """Remove what ``walk`` has kept."""
        if self.directory is not None:
            shutil.rmtree(self.directory / f"{kind}-{self._identity(kind, name)}", ignore_errors=True)

    def _identity(self, kind: str, name: Any) -> str:
        text = json.dumps([dict(self.job), kind, name], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _path(self, kind: str, identity: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{kind}-{identity}.piece"


#: The pieces of a validation of which nothing is kept, and that one process computes.
UNKEPT = Pieces()
