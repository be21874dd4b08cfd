"""A quantized model as a finished walk committed it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from glmexport.architecture.description import Architecture
from glmexport.bundle.records import AllocatedGroup, QuantizedMatrix
from glmexport.quantization.decisions import ALLOCATION, FOLDS, allocated_groups
from glmexport.quantization.job import QuantizationJob
from glmexport.quantization.largest import Seen
from glmexport.quantization.names import committed_with, draft_steps
from glmexport.quantization.weights import Weights


@dataclass(frozen=True)
class QuantizedModel:
    """The matrices that a walk committed, and how it found them; all in the order of the model."""

    #: With the checkpoint as scales are folded in it.
    job: QuantizationJob
    #: The names under which matrices are committed, and of those that only drafts are made with.
    parts: tuple[str, ...]
    draft_parts: tuple[str, ...]
    records: tuple[QuantizedMatrix, ...]
    draft_records: tuple[QuantizedMatrix, ...]
    #: What the matrices took, without those that only drafts are made with, over all attempts.
    seconds: float
    #: The largest number that a matrix or a norm read of the calibration text, over all positions; None: no text was
    #: run. What matrices give is seen where the next one reads it.
    largest: Seen | None
    #: What the budget's bits were given to; empty for a recipe without one.
    allocation: tuple[AllocatedGroup, ...]

    @classmethod
    def read(cls, job: QuantizationJob) -> QuantizedModel:
        """Read what was committed; every committed file is hashed for it, once."""
        steps = committed_with(job.architecture, job.recipe)
        parts = tuple(part for with_step in steps.values() for part in with_step)
        draft_parts = tuple(draft_steps(job.architecture.token_prediction))
        notes = {part: _note(job, part) for part in (FOLDS, ALLOCATION, *parts, *draft_parts)}
        seen = [Seen(*notes[step]["largest"]) for step in steps if notes[step].get("largest")]
        return cls(
            job=job,
            parts=parts,
            draft_parts=draft_parts,
            records=_records(notes[part] for part in parts),
            draft_records=_records(notes[part] for part in draft_parts),
            seconds=sum(notes[part].get("seconds", 0.0) for part in (*parts, FOLDS, ALLOCATION)),
            largest=max(seen, default=None),
            allocation=allocated_groups(job.work, job.architecture, job.recipe),
        )

    def weights(self, architecture: Architecture | None = None) -> Weights:
        """Return the weights of ``architecture``, which is this model or a part of it."""
        steps = [*self.parts, *self.draft_parts]
        return Weights(self.job.checkpoint, architecture or self.job.architecture, self.job.work, steps)


def _note(job: QuantizationJob, part: str) -> dict[str, Any]:
    record = job.work.record(part)
    note: dict[str, Any] = record["note"] if record else {}
    return note


def _records(notes: Iterable[dict[str, Any]]) -> tuple[QuantizedMatrix, ...]:
    return tuple(QuantizedMatrix.model_validate(record) for note in notes for record in note.get("linears", []))
