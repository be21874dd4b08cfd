"""The largest number that calibration text causes, for targets that compute in a type with a small range."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

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
