"""The layer that predicts tokens further ahead: rounded to nearest, with nothing measured for it.

It decides how often a guess is right, and never which tokens are answered.
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
    every = draft_steps(draft)
    missing = job.ranks.decide(lambda: [step for step in every if job.work.record(step) is None])
    steps = {step: every[step] for step in missing}
    if draft is None or not steps:
        return
    with job.progress.track("Rounding the MTP layer", len(steps)) as track:
        for step, linears in steps.items():
            started = time.monotonic()
            part = QuantizedPart()
            for linear in linears:
                part += _rounded(quantizer, linear, draft.layer.index)
            job.commit(step, part.matrices, part.note(time.monotonic() - started))
            track.advance(1, step)


def _rounded(quantizer: Quantizer, linear: Linear, layer: int) -> QuantizedPart:
    """Return ``linear`` in its format, or as a checkpoint stores it quantized; nothing in full precision."""
    form, matrix = quantizer.plan.form(linear.weight), quantizer.stored(linear.weight)
    if matrix is None and form is not None:
        matrix = quantizer.rounded(linear.weight, form)
    if matrix is None:
        return QuantizedPart()
    return QuantizedPart({linear.weight: matrix}, (unmeasured(linear.weight, layer, linear.part, matrix),))
