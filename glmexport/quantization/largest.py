"""The largest number that calibration text brings about, for targets that compute in a type which ends early."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: What a number that is none counts as: beyond every type.
_BEYOND = float(torch.finfo(torch.float32).max)


class Seen(NamedTuple):
    """The largest magnitude, and the module that read it or whose layer it passed."""

    magnitude: float
    at: str


class Largest:
    """Keeps the largest magnitude of what it is shown, of the quantized model's stream alone."""

    def __init__(self) -> None:
        self._seen: Seen | None = None

    def see(self, values: Tensor, at: str) -> None:
        """Look at ``values`` of any shape, which ``at`` reads."""
        if not values.numel():
            return
        # NaN comes through both extremes.
        low, high = (float(extreme) for extreme in values.aminmax())
        magnitude = max(abs(low), abs(high)) if math.isfinite(low) and math.isfinite(high) else _BEYOND
        if self._seen is None or magnitude > self._seen.magnitude:
            self._seen = Seen(magnitude, at)

    def take(self) -> Seen | None:
        """What was seen since the last time; None: nothing."""
        seen, self._seen = self._seen, None
        return seen
