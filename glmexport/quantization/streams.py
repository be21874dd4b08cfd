"""Calibration text on its way through the model, twice: as the original computes it and as the quantized model does.

Hessians are measured on the quantized stream, whose activations the linears will see in the finished bundle; the
original stream says what their outputs ought to be. Both are kept in files and read a few sequences at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glmexport.architecture import DecoderLayer, Linear, Reference
from glmexport.architecture.description import ResidualBranch
from glmexport.architecture.reference import Substitute
from glmexport.calibration import CalibrationSet, CrossMoment, Hessian
from glmexport.quantization.goal import Goal, Sample, stream_difference
from glmexport.quantization.linear import QuantizedLinear
from glmexport.quantization.store import WorkDirectory

QUANTIZED, ORIGINAL = "quantized", "original"
#: Held-out positions that solutions are judged on; every further one would cost a product a matrix.
_SAMPLE_POSITIONS = 2048


@dataclass(frozen=True)
class Measured:
    """What the linears of a tap are solved from: ``goals`` by weight key, without an asymmetric target empty."""

    hessian: Hessian
    sample: Sample | None
    goals: dict[str, Goal]


@dataclass
class _Accumulator:
    """Moments over the calibration sequences and values at the held-out positions."""

    hessian: Hessian
    cross: CrossMoment | None
    of_inputs: bool
    inputs: list[Tensor] = field(default_factory=list)
    differences: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


class Streams:
    """The streams of one walk, committed to ``work`` with each of its steps."""

    def __init__(
        self,
        reference: Reference,
        calibration: CalibrationSet,
        work: WorkDirectory,
        *,
        asymmetric: bool,
        batch_tokens: int,
    ) -> None:
        self.reference = reference
        self.calibration = calibration
        self.work = work
        self.names = (QUANTIZED, ORIGINAL) if asymmetric and bool(calibration.selection.any()) else (QUANTIZED,)
        self._batch = max(1, batch_tokens // calibration.ids.shape[1])
        self._positions = reference.position_embeddings(calibration.ids.shape[1])
        self._weights = calibration.weights()

    @property
    def asymmetric(self) -> bool:
        """Whether the original's stream is kept too."""
        return ORIGINAL in self.names

    def embedded(self, table: QuantizedLinear | None) -> dict[str, Iterator[Tensor]]:
        """What the first block reads."""

        def rows(lookup: QuantizedLinear | None) -> Iterator[Tensor]:
            for ids in torch.split(self.calibration.ids, self._batch):
                yield self.reference.embed(ids) if lookup is None else lookup.lookup(ids)

        return {name: rows(table if name == QUANTIZED else None) for name in self.names}

    def advance(self, before: str, layer: DecoderLayer, substitute: Substitute) -> dict[str, Iterator[Tensor]]:
        """What the next block reads, from the activations committed with step ``before``."""

        def outputs(name: str) -> Iterator[Tensor]:
            block = self.reference.block(layer, substitute if name == QUANTIZED else None)
            for start, stop in self._batches():
                yield block.forward(self._read(before, name, start, stop), self._positions)

        return {name: outputs(name) for name in self.names}

    def measure(self, before: str, layer: DecoderLayer, tap: str, substitute: Substitute) -> Measured:
        """Measure ``tap`` of the block that reads the activations committed with ``before``."""
        linears = layer.taps[tap]
        branch = next((branch for branch in layer.branches if branch.output in linears), None)
        keys = [linears[0].key] if branch is None else [branch.input_norm.key, linears[0].key]
        blocks = {
            QUANTIZED: self.reference.block(layer, substitute, before=tap),
            **({ORIGINAL: self.reference.block(layer, before=tap)} if self.asymmetric else {}),
        }

        def read(name: str, start: int, stop: int) -> list[Tensor]:
            return blocks[name].inputs(keys, self._read(before, name, start, stop), self._positions)

        into = self._accumulator(linears[0], of_inputs=branch is None)
        compare = None if branch is None or not self.asymmetric else _Comparison(self.reference, branch)
        for start, stop in self._batches():
            ours = read(QUANTIZED, start, stop)
            difference = None
            if self.asymmetric:
                theirs = read(ORIGINAL, start, stop)
                difference = theirs[-1] - ours[-1] if compare is None else compare(ours, theirs)
            self._add(into, start, stop, ours[-1], difference)
        return self._measured(into, linears)

    def measure_head(self, before: str, head: Linear) -> Measured:
        """Measure the input of the lm_head, behind the final norm."""
        into = self._accumulator(head, of_inputs=True)
        for start, stop in self._batches():
            ours = self.reference.final_norm(self._read(before, QUANTIZED, start, stop))
            difference = None
            if self.asymmetric:
                difference = self.reference.final_norm(self._read(before, ORIGINAL, start, stop)) - ours
            self._add(into, start, stop, ours, difference)
        return self._measured(into, (head,))

    def _accumulator(self, linear: Linear, *, of_inputs: bool) -> _Accumulator:
        size = linear.in_features
        differences = size if of_inputs else linear.out_features
        return _Accumulator(Hessian(size), CrossMoment(differences, size) if self.asymmetric else None, of_inputs)

    def _add(self, into: _Accumulator, start: int, stop: int, inputs: Tensor, difference: Tensor | None) -> None:
        prefix = self.calibration.prefix
        held = self.calibration.selection[start:stop]
        weights = self._weights[start:stop]
        inputs = inputs[:, prefix:]
        into.hessian.add(inputs[~held], weights[~held])
        stride = -(-self.calibration.selection_tokens // _SAMPLE_POSITIONS) or 1
        chosen = inputs[held][:, ::stride]
        into.inputs.append(chosen.flatten(0, 1))
        into.weights.append(weights[held, None].expand(chosen.shape[:2]).flatten())
        if difference is not None and into.cross is not None:
            difference = difference[:, prefix:]
            into.cross.add(difference[~held], inputs[~held], weights[~held])
            into.differences.append(difference[held][:, ::stride].flatten(0, 1))

    def _measured(self, into: _Accumulator, linears: tuple[Linear, ...]) -> Measured:
        sample = None
        if bool(self.calibration.selection.any()):
            sample = Sample(torch.cat(into.inputs), torch.cat(into.weights))
        if into.cross is None:
            return Measured(into.hessian, sample, {})
        goal = Goal(into.cross.matrix, torch.cat(into.differences), into.of_inputs)
        return Measured(into.hessian, sample, {linear.weight: goal for linear in linears})

    def _batches(self) -> Iterator[tuple[int, int]]:
        count = len(self.calibration.languages)
        for start in range(0, count, self._batch):
            yield start, min(start + self._batch, count)

    def _read(self, step: str, name: str, start: int, stop: int) -> Tensor:
        shape = (*self.calibration.ids.shape, self.reference.architecture.hidden_size)
        return self.work.activations(step, name, shape).read(start, stop)


class _Comparison:
    """How far the output of a branch's last linear, still unquantized, is from where the original has the stream."""

    def __init__(self, reference: Reference, branch: ResidualBranch) -> None:
        self._weight = reference.checkpoint.read(branch.output.weight)
        norm = branch.output_norm
        self._gain = None if norm is None else reference.checkpoint.read(norm.weight)
        self._epsilon = 0.0 if norm is None else norm.epsilon

    def __call__(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """``ours`` and ``theirs``: the stream that the branch adds to, and the input of its last linear."""
        branch = theirs[1] @ self._weight.T
        difference = branch - ours[1] @ self._weight.T
        return difference.add_(stream_difference(branch, ours[0], theirs[0], self._gain, self._epsilon))
