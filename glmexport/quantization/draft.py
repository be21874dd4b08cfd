"""The layer that predicts tokens further ahead: rounded to nearest, with nothing measured for it.

It decides how often a guess is right, and never what is answered.
"""

from __future__ import annotations

import time

from glmexport.architecture.description import Linear
from glmexport.quantization.names import draft_steps
from glmexport.quantization.part import QuantizedPart
from glmexport.quantization.quantizer import Quantizer
from glmexport.quantization.record import unmeasured


def round_draft(quantizer: Quantizer) -> None:
    """Commit every part of the layer that is not committed yet, if the model has one."""
    job = quantizer.job
    draft = job.architecture.token_prediction
    steps = {step: linears for step, linears in draft_steps(draft).items() if job.work.record(step) is None}
    if draft is None or not steps:
        return
    with job.progress.track("Rounding the MTP layer", len(steps)) as track:
        for step, linears in steps.items():
            started = time.monotonic()
            part = QuantizedPart()
            for linear in linears:
                part += _rounded(quantizer, linear, draft.layer.index)
            job.work.commit(step, part.matrices, part.note(time.monotonic() - started))
            track.advance(1, step)


def _rounded(quantizer: Quantizer, linear: Linear, layer: int) -> QuantizedPart:
    """Return ``linear`` in its format; nothing where it stays in full precision.

    Its linears have the format of what every token passes, tables of its own that of the model's.
    """
    recipe = quantizer.job.recipe
    inside = None if recipe.keeps_stored else recipe.linear(mixture=True, routed=False)
    form = {"lm_head": recipe.lm_head, "embedding": recipe.embedding}.get(linear.part, inside)
    matrix = quantizer.stored(linear.weight) if recipe.keeps_stored else None
    if matrix is None and form is not None:
        matrix = quantizer.rounded(linear.weight, form)
    if matrix is None:
        return QuantizedPart()
    return QuantizedPart({linear.weight: matrix}, (unmeasured(linear.weight, layer, linear.part, matrix),))
