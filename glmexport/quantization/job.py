"""The job of a walk: a checkpoint, the recipe for it, and the place and the bounds of the work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glmexport.architecture.description import Architecture
from glmexport.calibration.sequences import CalibrationSet
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.stopwatch import Stopwatch
from glmexport.quantization.memory import MemoryPlan
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.reference import CPU, Reference
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic

#: The parts of a step by which its time is noted: what is measured, the solver, and what takes the text on to the next
#: step. Hashes and flushes are in none of them.
CAPTURE, SOLVE, ADVANCE = "capture", "solve", "advance"


@dataclass(frozen=True)
class QuantizationJob:
    """One checkpoint to be quantized by one recipe.

    Everything is computed on ``device``; weights and activations come to it as they are needed.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    recipe: Recipe
    #: The calibration sequences; None for recipes that need no text.
    calibration: CalibrationSet | None
    #: The directory to which every finished step is committed.
    work: WorkDirectory
    memory: MemoryPlan
    progress: Progress
    device: torch.device = CPU
    #: The way in which products of fp32 matrices are computed; whoever walks sets torch to it.
    arithmetic: OriginalArithmetic = UNCHECKED
    #: The time of the step under way.
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def reference(self) -> Reference:
        """Return the original's arithmetic on the device."""
        return Reference(self.checkpoint, self.architecture, self.device)

    def chunks(self, key: str) -> Iterator[Tensor]:
        """Yield the matrix ``key`` [N, K] fp32 on the device, a few rows [n, K] at a time."""
        rows, columns = self.checkpoint.shape(key)
        count = max(64, self.memory.chunk_weights // columns)
        for start in range(0, rows, count):
            yield self.checkpoint.rows(key, start, min(start + count, rows)).to(self.device)
