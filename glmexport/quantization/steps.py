"""The steps of a walk: each quantizes a part of the model, and takes the calibration text through it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from glmexport.architecture.description import DecoderLayer, Linear
from glmexport.quantization.job import CAPTURE
from glmexport.quantization.largest import Seen
from glmexport.quantization.names import EMBEDDING, HEAD, block_step, piece_step
from glmexport.quantization.part import QuantizedPart
from glmexport.quantization.quantizer import Quantizer
from glmexport.quantization.streams import Hidden, Passage, Streams


@dataclass(frozen=True)
class Advanced:
    """The hidden states that the next step reads, and the largest number on the way to them."""

    hidden: Hidden = field(default_factory=dict)
    largest: Seen | None = None


class Step(Protocol):
    """A part of the model that is quantized and committed before the next one is read."""

    @property
    def name(self) -> str:
        """The name under which the step is committed."""
        ...

    def quantize(self) -> QuantizedPart:
        """Capture the input of each matrix, where there is text, and quantize one after the other."""
        ...

    def advance(self, part: QuantizedPart) -> Advanced:
        """Take the text through ``part``, which ``quantize`` returned; do nothing without text."""
        ...


class EmbeddingStep:
    """The embedding, whose codes are fixed before there are any activations."""

    name = EMBEDDING

    def __init__(self, quantizer: Quantizer, streams: Streams | None) -> None:
        self._quantizer = quantizer
        self._streams = streams

    def quantize(self) -> QuantizedPart:
        """Round the table to nearest."""
        return self._quantizer.embedding()

    def advance(self, part: QuantizedPart) -> Advanced:
        """Look up the tokens of the text."""
        if self._streams is None:
            return Advanced()
        return Advanced(self._streams.embedded(part.matrices.get(self._quantizer.job.architecture.embedding)))


class BlockStep:
    """A decoder layer, tap after tap in the order in which data passes them; ``before`` names the step before it.

    What is quantized is committed tap by tap, so that a walk that is killed inside of a layer need not solve it again.
    """

    def __init__(self, quantizer: Quantizer, streams: Streams | None, before: str, layer: DecoderLayer) -> None:
        self.name = block_step(layer.index)
        self._quantizer = quantizer
        self._layer = layer
        #: The passage of the text through this layer; None without text.
        self.passage: Passage | None = streams.enter(before, layer) if streams else None

    @property
    def linears(self) -> Sequence[Linear]:
        """The matrices that ``quantize`` quantizes."""
        return self._layer.linears

    def quantize(self) -> QuantizedPart:
        """Quantize tap after tap: each reads what those before it give as they were quantized."""
        quantizer, layer, part = self._quantizer, self._layer, QuantizedPart()
        if quantizer.job.recipe.keeps_stored:
            return quantizer.keep_stored(self.linears, layer.index)
        taps = [
            tap
            for tap, linears in layer.taps.items()
            if quantizer.plan.form(linears[0].weight) is not None and linears[0] in self.linears
        ]
        if self.passage is None:
            for tap in taps:
                part += quantizer.round(layer.taps[tap], layer.index)
            return part
        work = quantizer.job.work
        pieces = {tap: piece_step(self.name, index) for index, tap in enumerate(taps)}
        kept = quantizer.job.ranks.decide(lambda: [tap for tap in taps if work.record(pieces[tap]) is not None])
        for tap in taps:
            if tap in kept:
                self.passage.pass_by(tap, part.weight)
                part += QuantizedPart.read(work, pieces[tap])
            else:
                part += self._solve(tap, pieces[tap], part, self.passage)
        return part

    def _solve(self, tap: str, piece: str, before: QuantizedPart, passage: Passage) -> QuantizedPart:
        """Quantize one tap behind the part ``before``, and commit it as a ``piece`` of the step."""
        quantizer, started = self._quantizer, time.monotonic()
        with quantizer.job.stopwatch.running(CAPTURE):
            measured = passage.measure(tap, before.weight)
        part = quantizer.solve(self._layer.taps[tap], self._layer.index, measured)
        note = part.note(time.monotonic() - started) | {"largest": part.largest}
        quantizer.job.commit(piece, part.matrices, note)
        return part

    def advance(self, part: QuantizedPart) -> Advanced:
        """Compute what the next layer reads."""
        return Advanced(self.passage.outputs(part.weight) if self.passage else {})


class HeadStep:
    """The lm_head; ``before`` names the step before it."""

    name = HEAD

    def __init__(self, quantizer: Quantizer, streams: Streams | None, before: str) -> None:
        self._quantizer = quantizer
        self._streams = streams
        self._before = before

    def quantize(self) -> QuantizedPart:
        """Quantize the lm_head, unless it is the embedding, whose codes are fixed."""
        quantizer, job = self._quantizer, self._quantizer.job
        head = job.architecture.lm_head
        if job.recipe.keeps_stored and head.weight in job.checkpoint.quantized:
            return quantizer.keep_stored([head], None)
        form = quantizer.plan.form(head.weight)
        if form is None or job.architecture.tied:
            return QuantizedPart()
        if self._streams is None:
            return quantizer.round([head], None)
        # At 8 bits the sweep already leaves next to nothing, and the head has the most rows of all.
        rounds = 0 if form.bits == 8 else job.recipe.solver.polish_rounds
        solver = job.recipe.solver.model_copy(update={"polish_rounds": rounds})
        with job.stopwatch.running(CAPTURE):
            measured = self._streams.measure_head(self._before, head)
        return quantizer.solve((head,), None, measured, solver)

    def advance(self, part: QuantizedPart) -> Advanced:
        """Return nothing: nobody reads logits."""
        return Advanced()
