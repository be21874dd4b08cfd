"""What a walk is given: a checkpoint, how to quantize it, and where and within which bounds it works."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.architecture.description import Architecture
from glmexport.calibration.sequences import CalibrationSet
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Recipe
from glmexport.quantization.memory import MemoryPlan
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.reference import CPU, Reference


@dataclass(frozen=True)
class QuantizationJob:
    """One checkpoint to be quantized by one recipe.

    Everything is computed on ``device``; weights and activations come to it as they are needed.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    recipe: Recipe
    #: None for recipes that need no text.
    calibration: CalibrationSet | None
    #: Where every finished step is committed.
    work: WorkDirectory
    memory: MemoryPlan
    progress: Progress
    device: torch.device = CPU

    def reference(self) -> Reference:
        """Return the original's arithmetic on the device."""
        return Reference(self.checkpoint, self.architecture, self.device)

    def chunks(self, key: str) -> Iterator[Tensor]:
        """Yield the matrix ``key`` [N, K] fp32 on the device, a few rows [n, K] at a time."""
        rows, columns = self.checkpoint.shape(key)
        count = max(64, self.memory.chunk_weights // columns)
        for start in range(0, rows, count):
            yield self.checkpoint.rows(key, start, min(start + count, rows)).to(self.device)
