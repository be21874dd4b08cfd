"""The layer that predicts tokens further ahead: rounded to nearest, with nothing measured for it.

It decides how often a guess is right, and never what is answered.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from glmexport.architecture.description import Linear
from glmexport.architecture.token_prediction import TokenPrediction
from glmexport.bundle.records import QuantizedMatrix
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Format, Recipe
from glmexport.quantization.record import unmeasured
from glmexport.quantization.steps import draft_steps
from glmexport.quantization.store import WorkDirectory


def round_draft(
    draft: TokenPrediction,
    recipe: Recipe,
    work: WorkDirectory,
    progress: Progress,
    nearest: Callable[[Linear, Format], QuantizedLinear],
    stored: Callable[[Linear], QuantizedLinear | None],
) -> None:
    """Commit every part of ``draft`` that is not committed yet.

    Args:
        draft: the layer.
        recipe: its linears get the format of what every token passes, tables of its own that of the model's.
        work: where it is committed.
        progress: one step a part.
        nearest: rounds a matrix.
        stored: a matrix as a quantized checkpoint stores it; None if it is in full precision.
    """
    steps = {step: linears for step, linears in draft_steps(draft).items() if work.record(step) is None}
    if not steps:
        return
    inside = None if recipe.keeps_stored else recipe.linear(mixture=True, routed=False)
    with progress.track("Rounding the MTP layer", len(steps)) as track:
        for step, linears in steps.items():
            started = time.monotonic()
            solved: dict[str, QuantizedLinear] = {}
            records: list[QuantizedMatrix] = []
            for linear in linears:
                form = {"lm_head": recipe.lm_head, "embedding": recipe.embedding}.get(linear.part, inside)
                matrix = stored(linear) if recipe.keeps_stored else None
                if matrix is None and form is not None:
                    matrix = nearest(linear, form)
                if matrix is not None:
                    solved[linear.weight] = matrix
                    records.append(unmeasured(linear.weight, draft.layer.index, linear.part, matrix))
            note = {"linears": [record.model_dump() for record in records], "seconds": time.monotonic() - started}
            work.commit(step, solved, note)
            track.advance(1, step)
