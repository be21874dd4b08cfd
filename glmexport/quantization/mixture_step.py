"""The step of a layer with experts: its attention like that of any other, then one expert after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from glmexport.architecture.description import DecoderLayer, GatedMlp, Linear
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.quantization.job import CAPTURE
from glmexport.quantization.mixture import Mixture
from glmexport.quantization.names import expert_steps
from glmexport.quantization.part import QuantizedPart, largest_of
from glmexport.quantization.quantizer import Quantizer
from glmexport.quantization.record import routed
from glmexport.quantization.steps import Advanced, BlockStep
from glmexport.quantization.streams import Streams


class MixtureStep(BlockStep):
    """A decoder layer with experts, each of which is committed by itself before the layer is.

    An expert's outputs join the streams before the next one is read, so that one is in memory at a time.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        streams: Streams | None,
        before: str,
        layer: DecoderLayer,
        experts: MixtureOfExperts,
    ) -> None:
        super().__init__(quantizer, streams, before, layer)
        self._experts = experts

    @property
    def linears(self) -> Sequence[Linear]:
        """The matrices that ``quantize`` quantizes: those of the attention."""
        return self._layer.attention.linears

    def advance(self, part: QuantizedPart) -> Advanced:
        """Quantize and commit expert after expert, the shared one last, and compute what the next layer reads."""
        job, mixture, seen = self._quantizer.job, None, []
        if self.passage:
            self.passage.move_on(part.weight)
            mixture = Mixture(self.passage, self._experts, job.memory.batch_tokens)
            seen.append(mixture.largest)
        steps = expert_steps(self._layer)
        for name, mlp in sorted(steps.items(), key=lambda step: step[1] is self._experts.shared):
            if job.work.record(name) is None:
                started = time.monotonic()
                expert = self.quantize_expert(mlp, mixture)
                job.work.commit(name, expert.matrices, expert.note(time.monotonic() - started))
            if mixture:
                seen.append(mixture.add(mlp, {key: job.work.linear(name, key) for key in job.work.formats(name)}))
        return Advanced(mixture.outputs() if mixture else {}, largest_of(seen))

    def quantize_expert(self, mlp: GatedMlp, mixture: Mixture | None) -> QuantizedPart:
        """Quantize the matrices of one expert on the positions that chose it; to nearest without text."""
        quantizer, layer, part = self._quantizer, self._layer.index, QuantizedPart()
        if quantizer.job.recipe.keeps_stored:
            return quantizer.keep_stored(mlp.linears, layer)
        if mixture is None:
            return quantizer.round(mlp.linears, layer)
        solver = quantizer.expert_solver(mlp.gate_up.weight)
        for linear in mlp.linears:
            with quantizer.job.stopwatch.running(CAPTURE):
                found = mixture.measure(mlp, linear, part.matrices.get(mlp.gate_up.weight))
            solved = quantizer.solve((linear,), layer, found.measured, solver, found.tokens)
            record = routed(solved.records[0], linear, found.chosen, found.own_tokens)
            part += replace(solved, records=(record,))
        return part
