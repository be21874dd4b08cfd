"""The largest number that calibration text causes, for targets that compute in a type with a small range."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from glmexport.quantization.ranks import Ranks

#: The magnitude of a value that is not a number: beyond every type.
_BEYOND = float(torch.finfo(torch.float32).max)


class Seen(NamedTuple):
    """A largest magnitude, and the module that read it or whose layer it passed."""

    magnitude: float
    at: str


class Largest:
    """A keeper of the largest magnitude of the values that it looks at, on the quantized model's stream alone."""

    def __init__(self) -> None:
        self._seen: Seen | None = None

    def see(self, values: Tensor, at: str) -> None:
        """Look at ``values`` of any shape, which ``at`` reads."""
        if not values.numel():
            return
        # Both extremes pass NaN on.
        low, high = (float(extreme) for extreme in values.aminmax())
        magnitude = max(abs(low), abs(high)) if math.isfinite(low) and math.isfinite(high) else _BEYOND
        if self._seen is None or magnitude > self._seen.magnitude:
            self._seen = Seen(magnitude, at)

    def take(self) -> Seen | None:
        """Return the largest magnitude since the last call; None: nothing was seen."""
        seen, self._seen = self._seen, None
        return seen


class SeenByBatch:
    """A keeper of the largest magnitude of each item of work, by the first number of its name, over all ``ranks``."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._seen: dict[int, Seen] = {}

    def see(self, item: tuple[int, ...], *looked_at: tuple[Tensor, str]) -> None:
        """Look at the values of ``item``, each with what reads them, in order."""
        largest = Largest()
        for values, at in looked_at:
            largest.see(values, at)
        seen = largest.take()
        if seen is not None:
            self._seen[item[0]] = seen

    def take(self) -> Seen | None:
        """Return the largest of all ranks, of equal ones that of the first item; every rank has to call this."""
        found = [entry for entries in self._ranks.gather([[*item] for item in self._seen.items()]) for entry in entries]
        in_order = sorted(found, key=lambda entry: int(entry[0]))
        return max((Seen(*seen) for _, seen in in_order), key=lambda seen: seen.magnitude, default=None)
