"""The weights of a model under its recipe: quantized where the walk committed them, else in full precision."""

from __future__ import annotations

import torch
from torch import Tensor

from glmexport.architecture.description import Architecture
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format
from glmexport.quantization.store import WorkDirectory


class Weights:
    """Weights that are read on demand, without a cache; ``steps`` are the committed steps of the walk in ``work``."""

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, work: WorkDirectory | None, steps: list[str]
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self._work = work
        self._forms: dict[str, tuple[str, Format]] = {}
        if work is not None:
            for step in steps:
                self._forms |= {key: (step, form) for key, form in work.formats(step).items()}

    def form(self, key: str) -> Format | None:
        """Return the format of the matrix with that checkpoint key; None if it stays in full precision."""
        entry = self._forms.get(key)
        return None if entry is None else entry[1]

    def quantized(self, key: str) -> QuantizedLinear:
        """Return a quantized matrix, unpacked."""
        step, _ = self._forms[key]
        assert self._work is not None
        return self._work.linear(step, key)

    def packed(self, keys: list[str], what: str) -> Tensor:
        """Return ``codes``, ``scales`` or ``zero_points`` of quantized matrices, packed and stacked by their rows."""
        assert self._work is not None
        return torch.cat([self._work.packed(self._forms[key][0], key, what) for key in keys])

    def tensor(self, key: str) -> Tensor:
        """Return the checkpoint's tensor, fp32."""
        return self.checkpoint.read(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of the checkpoint's tensor."""
        return self.checkpoint.shape(key)
