"""The processes that build a model together: its ranks, of which torchrun starts as many as people ask for.

Work is cut into the same items however many ranks there are. Each item is computed whole by the rank that owns it, and
what it gives is sent to the others in the order of the items: nothing is added up across ranks, so that any number of
them gives the same bytes. Item i belongs to rank i mod size.

Only rank 0 writes what all of them share, and only it tells people anything. Nothing that comes from another rank is
executed: what is sent are bytes of tensors, and JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from glmexport.foundation.errors import MachineError
from glmexport.reference.reference import CPU

Item = TypeVar("Item")


@dataclass(frozen=True)
class Parcel:
    """The result of a piece of work, which all ranks get: tensors, any of which may be None, and what JSON can hold."""

    tensors: tuple[Tensor | None, ...] = ()
    facts: Any = None

    def __post_init__(self) -> None:
        # Others get the numbers alone: its owner must not compute with another layout than they, which may round
        # otherwise.
        laid_out = tuple(None if tensor is None else tensor.contiguous() for tensor in self.tensors)
        object.__setattr__(self, "tensors", laid_out)


class RankLost(MachineError):
    """Another rank ended before the work was done."""


class Ranks:
    """The ranks of one job as the one numbered ``rank`` of ``size`` sees them.

    One process alone is rank 0 of 1 and sends nothing. ``device`` is where its tensors are.

    Every rank has to call the same methods in the same order. Those that wait for others raise ``RankLost``.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device = CPU) -> None:
        self.rank = rank
        self.size = size
        self.device = device

    def on(self, device: torch.device) -> Ranks:
        """Return the same ranks for work whose tensors are on another device."""
        return Ranks(self.rank, self.size, device)

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    def own(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return those of ``items`` that this rank owns."""
        return items[self.rank :: self.size]

    def each(self, items: Sequence[Item], compute: Callable[[Item], Parcel]) -> Iterator[tuple[Item, Parcel]]:
        """Yield every one of ``items`` in order, with what ``compute`` gives for it on the rank that owns it."""
        for turn in range(0, len(items), self.size):
            together = items[turn : turn + self.size]
            mine = compute(together[self.rank]) if self.rank < len(together) else None
            for owner, item in enumerate(together):
                yield item, self._from(owner, mine if owner == self.rank else None)

    def collect(self, items: Sequence[Item], compute: Callable[[Item], Parcel]) -> Iterator[tuple[Item, Parcel]]:
        """Yield on rank 0 what ``each`` yields, and nothing on the others, which have to run through it all the same.

        Where only rank 0 needs the results, others need not wait for one another.
        """
        for turn in range(0, len(items), self.size):
            together = items[turn : turn + self.size]
            mine = compute(together[self.rank]) if self.rank < len(together) else None
            if not self.first:
                if mine is not None:
                    self._send(mine)
                continue
            for owner, item in enumerate(together):
                yield item, mine if owner == 0 and mine is not None else self._received(owner)

    def broadcast(self, value: Any = None) -> Any:
        """Return what rank 0 gave as ``value``, which JSON can hold; the others need give none."""
        return self._from(0, Parcel(facts=value) if self.first else None).facts

    def decide(self, choose: Callable[[], Any]) -> Any:
        """Return what ``choose`` gives on rank 0, the only one that calls it; JSON can hold it."""
        return self.broadcast(choose() if self.first else None)

    def gather(self, value: Any) -> list[Any]:
        """Return the ``value`` of every rank, which JSON can hold, in their order."""
        parcels = self.each(range(self.size), lambda _: Parcel(facts=value))
        return [parcel.facts for _, parcel in parcels]

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.gather(None)

    def _from(self, owner: int, parcel: Parcel | None) -> Parcel:
        """Return the parcel of rank ``owner``, which gives it here; the others give None."""
        if self.alone and parcel is not None:
            return parcel

        def share(tensor: Tensor) -> None:
            torch.distributed.broadcast(tensor, owner)

        return self._handed_on(parcel, share)

    def _send(self, parcel: Parcel) -> None:
        self._handed_on(parcel, lambda tensor: torch.distributed.send(tensor, 0))

    def _received(self, owner: int) -> Parcel:
        return self._handed_on(None, lambda tensor: torch.distributed.recv(tensor, owner))

    def _handed_on(self, parcel: Parcel | None, hand_on: Callable[[Tensor], object]) -> Parcel:
        """Return ``parcel``; where there is none, what others give: ``hand_on`` sends a tensor, or fills it."""
        header = None if parcel is None else _header(parcel)
        length = torch.tensor([0 if header is None else len(header)])
        with self.others():
            hand_on(length)
            header = torch.empty(int(length), dtype=torch.uint8) if header is None else header
            hand_on(header)
            if parcel is None:
                described = json.loads(header.numpy().tobytes())
                parcel = Parcel(tuple(map(self._room, described["tensors"])), described["facts"])
            for tensor in parcel.tensors:
                if tensor is not None and tensor.numel():
                    # What was computed in inference mode may be read nowhere else.
                    with torch.inference_mode():
                        hand_on(tensor.view(-1).view(torch.uint8))
        return parcel

    def _room(self, described: list[Any] | None) -> Tensor | None:
        """Return a tensor to be filled, of the type and shape that a header describes."""
        if described is None:
            return None
        return torch.empty(described[1], dtype=getattr(torch, described[0]), device=self.device)

    @contextmanager
    def others(self) -> Iterator[None]:
        """Turn what torch raises when another rank is gone into ``RankLost``."""
        try:
            yield
        except RuntimeError as error:
            raise RankLost(
                f"Rank {self.rank} of {self.size} lost the others: one of them has ended.",
                next_step="See what it said, if it said anything; then run the same command again. It goes on after "
                "the last finished piece.",
            ) from error


#: One process that shares its work with no other.
ALONE = Ranks()


def longest_first(costs: Sequence[float], size: int) -> list[int]:
    """Return the rank that owns each piece of work: the costliest is dealt out first, to whoever has least so far.

    The longest share is at most 4/3 - 1/(3 size) of the shortest possible (Graham 1969).
    """
    load, owners = [0.0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owners[index] = min(range(size), key=lambda rank: (load[rank], rank))
        load[owners[index]] += costs[index]
    return owners


def _header(parcel: Parcel) -> Tensor:
    tensors = [
        None if tensor is None else [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for tensor in parcel.tensors
    ]
    text = json.dumps({"tensors": tensors, "facts": parcel.facts})
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
