"""The step of a layer with experts: its attention like that of any other, then one expert after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from glmexport.architecture.description import DecoderLayer, GatedMlp, Linear
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.quantization.job import CAPTURE
from glmexport.quantization.mixture import Mixture
from glmexport.quantization.names import expert_steps
from glmexport.quantization.part import QuantizedPart, largest_of
from glmexport.quantization.quantizer import Quantizer
from glmexport.quantization.ranks import longest_first
from glmexport.quantization.record import routed
from glmexport.quantization.steps import Advanced, BlockStep
from glmexport.quantization.streams import Streams


class MixtureStep(BlockStep):
    """A decoder layer with experts, each of which is committed by itself before the layer is.

    One is in memory at a time. Routed ones are quantized by the ranks that own them, the shared one by all together.
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
        """Quantize and commit the experts, the shared one last, and compute what the next layer reads."""
        job, mixture, seen = self._quantizer.job, None, []
        if self.passage:
            self.passage.move_on(part.weight)
            mixture = Mixture(self.passage, self._experts, job.memory.batch_tokens)
            seen.append(mixture.largest)
        steps = expert_steps(self._layer)
        missing = job.ranks.decide(lambda: [name for name in steps if job.work.record(name) is None])
        self._quantize_routed([name for name in missing if steps[name] is not self._experts.shared], mixture)
        if mixture:
            seen.append(mixture.add(self._experts.experts, self._solved))
        for name in missing:
            if steps[name] is self._experts.shared:
                started = time.monotonic()
                shared = self.quantize_expert(steps[name], mixture)
                self._quantizer.remark(shared)
                job.commit(name, shared.matrices, shared.note(time.monotonic() - started))
        if mixture and self._experts.shared is not None:
            seen.append(mixture.add([self._experts.shared], self._solved))
        return Advanced(mixture.outputs() if mixture else {}, largest_of(seen))

    def _quantize_routed(self, names: Sequence[str], mixture: Mixture | None) -> None:
        """Quantize and commit the routed experts ``names``, each on the rank that owns it."""
        job, steps = self._quantizer.job, expert_steps(self._layer)
        said: list[str] = []
        if mixture and names:
            mixture.share_pool()
        costs = [mixture.cost(steps[name]) if mixture else 1.0 for name in names]
        for name, owner in zip(names, longest_first(costs, job.ranks.size), strict=True):
            if owner == job.ranks.rank:
                started = time.monotonic()
                expert = self.quantize_expert(steps[name], mixture, whole=True)
                job.work.commit(name, expert.matrices, expert.note(time.monotonic() - started))
                said += expert.remarks
        for remarks in job.ranks.gather(said):
            for remark in remarks:
                job.progress.remark(remark)

    def _solved(self, mlp: GatedMlp) -> dict[str, QuantizedLinear]:
        """Return the committed matrices of an expert."""
        work = self._quantizer.job.work
        (name,) = (step for step, expert in expert_steps(self._layer).items() if expert is mlp)
        return {key: work.linear(name, key) for key in work.formats(name)}

    def quantize_expert(self, mlp: GatedMlp, mixture: Mixture | None, *, whole: bool = False) -> QuantizedPart:
        """Quantize the matrices of one expert on the positions that chose it; to nearest without text.

        With ``whole`` this rank does so alone, else all of them together.
        """
        quantizer, layer, part = self._quantizer, self._layer.index, QuantizedPart()
        if quantizer.job.recipe.keeps_stored:
            return quantizer.keep_stored(mlp.linears, layer)
        if mixture is None:
            return quantizer.round(mlp.linears, layer, whole=whole)
        solver = quantizer.expert_solver(mlp.gate_up.weight)
        for linear in mlp.linears:
            with quantizer.job.stopwatch.running(CAPTURE):
                found = mixture.measure(mlp, linear, part.matrices.get(mlp.gate_up.weight))
            solved = quantizer.solve((linear,), layer, found.measured, solver, found.tokens, whole)
            record = routed(solved.records[0], linear, found.chosen, found.own_tokens)
            part += replace(solved, records=(record,))
        return part
