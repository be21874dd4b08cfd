"""The job of a walk: a checkpoint, the recipe for it, and the place and the bounds of the work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glmexport.architecture.description import Architecture
from glmexport.calibration.sequences import CalibrationSet
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.stopwatch import Stopwatch
from glmexport.quantization.memory import MemoryPlan
from glmexport.quantization.ranks import ALONE, Ranks
from glmexport.quantization.store import Activations, WorkDirectory
from glmexport.reference.reference import CPU, Reference
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic

#: The parts of a step by which its time is noted: what is measured, the solver, and what takes the text on to the next
#: step. Hashes and flushes are in none of them.
CAPTURE, SOLVE, ADVANCE = "capture", "solve", "advance"
#: Number of blocks into which a matrix is cut where they have so many rows: every block takes some time for each of its
#: columns, however few rows it has.
_SHARES, _LEAST_ROWS = 8, 512


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
    #: The processes that take part in it.
    ranks: Ranks = ALONE
    #: The way in which products of fp32 matrices are computed; whoever walks sets torch to it.
    arithmetic: OriginalArithmetic = UNCHECKED
    #: The time of the step under way.
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def reference(self) -> Reference:
        """Return the original's arithmetic on the device."""
        return Reference(self.checkpoint, self.architecture, self.device)

    def calibrated_reference(self) -> Reference:
        """Return the arithmetic by which calibration text passes the blocks."""
        return Reference(self.checkpoint, self.architecture, self.device, coarse=self.arithmetic.coarse)

    def blocks(self, key: str, *, whole: bool = False) -> list[tuple[int, int]]:
        """Return the blocks in which the matrix ``key`` [N, K] is quantized, as ``row_blocks`` does."""
        rows, columns = self.checkpoint.shape(key)
        return row_blocks(rows, columns, self.memory.chunk_weights, whole=whole)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` of the matrix ``key`` [N, K], fp32 on the device."""
        return self.checkpoint.rows(key, start, stop).to(self.device)

    def commit(
        self,
        step: str,
        linears: Mapping[str, QuantizedLinear],
        note: Mapping[str, Any],
        activations: Mapping[str, Iterator[Tensor] | Activations] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Commit a step that all ranks have computed: rank 0 writes it, and all go on when it is there.

        The other ranks run through streams that are computed as they are read, of which they have a share.
        """
        if self.ranks.first:
            self.work.commit(step, linears, note, activations, tensors)
        else:
            for stream in (activations or {}).values():
                if not isinstance(stream, Activations):
                    for _ in stream:
                        pass
        self.ranks.barrier()


def row_blocks(rows: int, columns: int, chunk_weights: int, *, whole: bool = False) -> list[tuple[int, int]]:
    """Return the first and last row of every block of a matrix, which has at most so many weights or 64 rows.

    Ranks share the blocks, and there are as many however many ranks there are. With ``whole`` one rank quantizes all of
    them: they are as large as memory allows.
    """
    count = max(64, chunk_weights // columns)
    if not whole:
        count = min(count, max(_LEAST_ROWS, -(-rows // _SHARES)))
    return [(start, min(start + count, rows)) for start in range(0, rows, count)]
