"""The layer that predicts tokens further ahead: rounded to nearest, with nothing measured for it.

It decides how often a guess is right, and never what is answered.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from glmexport.architecture.description import Linear
from glmexport.architecture.token_prediction import TokenPrediction
from glmexport.bundle.records import QuantizedMatrix
from glmexport.formats.plan import FormatPlan
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Format
from glmexport.quantization.record import unmeasured
from glmexport.quantization.steps import draft_steps
from glmexport.quantization.store import WorkDirectory


def round_draft(
    draft: TokenPrediction,
    plan: FormatPlan,
    work: WorkDirectory,
    progress: Progress,
    nearest: Callable[[Linear, Format], QuantizedLinear],
    stored: Callable[[Linear], QuantizedLinear | None],
) -> None:
    """Commit every part of ``draft`` that is not committed yet.

    Args:
        draft: the layer.
        plan: the format of its matrices. One that a checkpoint stores quantized keeps its codes.
        work: where it is committed.
        progress: one step a part.
        nearest: rounds a matrix.
        stored: a matrix as it is stored quantized; None if it is not, or the recipe does not keep such codes.
    """
    steps = {step: linears for step, linears in draft_steps(draft).items() if work.record(step) is None}
    if not steps:
        return
    with progress.track("Rounding the MTP layer", len(steps)) as track:
        for step, linears in steps.items():
            started = time.monotonic()
            solved: dict[str, QuantizedLinear] = {}
            records: list[QuantizedMatrix] = []
            for linear in linears:
                form = plan.form(linear.weight)
                matrix = stored(linear)
                if matrix is None and form is not None:
                    matrix = nearest(linear, form)
                if matrix is not None:
                    solved[linear.weight] = matrix
                    records.append(unmeasured(linear.weight, draft.layer.index, linear.part, matrix))
            note = {"linears": [record.model_dump() for record in records], "seconds": time.monotonic() - started}
            work.commit(step, solved, note)
            track.advance(1, step)
