"""The walk that quantizes a model one decoder block at a time: capture, quantize, advance, commit.

Every Hessian is measured on the inputs that the linear will see in the finished bundle, with everything before it
already quantized (see ``streams``). Nothing larger than a block, one Hessian and its factor is ever in memory, and a
walk that is killed goes on after its last committed block.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from glmexport.architecture.experts import MixtureOfExperts
from glmexport.foundation.recipe import Format
from glmexport.quantization.decisions import decide_folds, decide_formats
from glmexport.quantization.draft import round_draft
from glmexport.quantization.job import ADVANCE, QuantizationJob
from glmexport.quantization.mixture_step import MixtureStep
from glmexport.quantization.names import committed_with
from glmexport.quantization.part import largest_of
from glmexport.quantization.quantized_model import QuantizedModel
from glmexport.quantization.quantizer import Quantizer
from glmexport.quantization.steps import BlockStep, EmbeddingStep, HeadStep, Step
from glmexport.quantization.store import Activations
from glmexport.quantization.streams import Hidden, Streams


class Walk:
    """One pass through a checkpoint in which scales are folded, and under a budget every matrix has its format.

    Args:
        job: the job, whose checkpoint has scales folded in.
        allocated: formats that a budget gave, by weight key.
    """

    def __init__(self, job: QuantizationJob, allocated: Mapping[str, Format]) -> None:
        self.job = job
        self.streams = None if job.calibration is None else Streams(job)
        self._quantizer = Quantizer(job, allocated)
        self._committed_with = committed_with(job.architecture, job.recipe)
        #: The names of the steps in the order of the model.
        self.steps = tuple(self._committed_with)

    @classmethod
    def prepare(cls, job: QuantizationJob) -> Walk:
        """Decide what holds for all steps: which scales are folded, and under a budget every matrix's format."""
        folded = decide_folds(job)
        return cls(folded, decide_formats(folded))

    def run(self) -> QuantizedModel:
        """Commit every step that is not committed yet, and return the model that results."""
        self.take_steps()
        return QuantizedModel.read(self.job)

    def take_steps(self) -> None:
        """Commit every step that is not committed yet; every rank has to call this."""
        job, first = self.job, self.job.ranks.decide(self.resume_at)
        if first:
            job.progress.remark(f"Resuming after {self.steps[first - 1]} ({first} of {len(self.steps)} steps done).")
        with job.progress.track("Quantizing", len(self.steps)) as track:
            track.advance(first)
            for index in range(first, len(self.steps)):
                self.take_step(index)
                track.advance(1, self.steps[index])
        if job.ranks.first:
            job.work.drop_scratch()
            for step in self.steps[:first]:
                job.work.forget_pieces(step)
        round_draft(self._quantizer)

    def take_step(self, index: int) -> None:
        """Quantize the part of one step, take the text through it, and commit both."""
        job, step = self.job, self.open_step(index)
        stopwatch, started = job.stopwatch, time.monotonic()
        stages = stopwatch.begin()
        part = step.quantize()
        seconds = time.monotonic() - started
        self._quantizer.remark(part)
        with stopwatch.running(ADVANCE):
            advanced = step.advance(part)
        # Streams are computed while they are written, before the note is read.
        hidden: Hidden = {
            name: stream if isinstance(stream, Activations) else stopwatch.through(ADVANCE, stream)
            for name, stream in advanced.hidden.items()
        }
        note = part.note(seconds) | {"largest": largest_of((part.largest, advanced.largest)), "stages": stages}
        job.commit(step.name, part.matrices, note, hidden)
        if job.ranks.first:
            job.work.forget_pieces(step.name)
        if index and job.ranks.first:
            job.work.drop_activations(self.steps[index - 1])

    def open_step(self, index: int) -> Step:
        """Return the step of that index, which reads what the one before it committed."""
        if index == 0:
            return EmbeddingStep(self._quantizer, self.streams)
        before = self.steps[index - 1]
        if index == len(self.steps) - 1:
            return HeadStep(self._quantizer, self.streams, before)
        layer = self.job.architecture.layers[index - 1]
        if isinstance(layer.mlp, MixtureOfExperts) and self.job.recipe.quantizes_linears:
            return MixtureStep(self._quantizer, self.streams, before, layer, layer.mlp)
        return BlockStep(self._quantizer, self.streams, before, layer)

    def resume_at(self) -> int:
        """Return the index of the first step to do: after the last committed one whose activations are there."""
        work, done = self.job.work, 0
        for parts in self._committed_with.values():
            if any(work.record(part) is None for part in parts):
                break
            done += 1
        if done == len(self.steps) or self.streams is None:
            return done
        names = self.streams.names
        while done and not all(work.has_activations(self.steps[done - 1], name) for name in names):
            done -= 1
        return done


def walk(job: QuantizationJob) -> QuantizedModel:
    """Quantize the checkpoint of ``job``, as far as it is not committed yet."""
    return Walk.prepare(job).run()
