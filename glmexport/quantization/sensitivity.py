"""What each group of matrices costs in each format: the KL divergence it causes alone, everything else original.

One pass over the weights serves all trials. Every trial is a copy of the probe's activations that leaves the
original's at its group and goes through the rest of the model with original weights; divergences this small add up.
The trial's matrices are rounded to nearest on a searched grid: what GPTQ then gains is nearly the same factor in all.
Formats of the same bits are not all tried (``TieGroup.tried``): a small divergence is proportional to the energy of
the error at the matrices' outputs, which takes no pass through the model to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.architecture.description import DecoderLayer, Linear
from glmexport.calibration.sequences import CalibrationSet
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Format
from glmexport.quantization.allocation import EMBEDDING_TAP, HEAD_TAP, TieGroup
from glmexport.quantization.deviation import Outputs, of_head, of_states, of_states_and_head
from glmexport.quantization.memory import MemoryPlan, compared_trials
from glmexport.quantization.nearest import round_to_nearest
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.reference import Block, Reference

#: Tokens of a probe sequence.
_LONGEST = 256
#: Positions of the probe on which formats of the same bits are compared.
_SAMPLED_POSITIONS = 512
ORIGINAL, TRIALS = "original", "trials"


def probe_ids(calibration: CalibrationSet, tokens: int) -> Tensor:
    """Token ids [sequences, length] of about ``tokens`` tokens: held-out text, spread over the languages."""
    held = calibration.ids[calibration.selection] if bool(calibration.selection.any()) else calibration.ids
    length = min(_LONGEST, held.shape[1])
    wanted = max(1, tokens // length)
    stride = max(1, len(held) // wanted)
    return held[::stride][:wanted, :length]


@dataclass(frozen=True)
class _Trial:
    group: int
    candidate: int
    form: Format


@dataclass(frozen=True)
class _Rounded:
    """A rounded matrix [N, K] fp32, if it was kept, and the energy of the error at its output, as a share of it."""

    error: float
    weight: Tensor | None


class Probe:
    """Probe text on its way through the original, and through every trial.

    Both are committed to ``work`` after every block, so that a pass that is killed goes on from there.
    """

    def __init__(
        self,
        reference: Reference,
        ids: Tensor,
        prefix: int,
        groups: Sequence[TieGroup],
        work: WorkDirectory,
        memory: MemoryPlan,
    ) -> None:
        self.reference = reference
        self.ids = ids
        self.prefix = prefix
        self.groups = groups
        self.work = work
        self.memory = memory
        self._positions = reference.position_embeddings(ids.shape[1])
        self._batch = max(1, memory.batch_tokens // ids.shape[1])
        #: In the order of the model, so that those that have left the original after some block come first.
        self._trials = [
            _Trial(number, candidate, group.candidates[candidate])
            for number, group in enumerate(groups)
            if group.tap != HEAD_TAP
            for candidate in group.tried
        ]
        #: Of the sampled outputs, by group and candidate.
        self._errors: dict[int, list[float]] = {}
        self._steps = ["sensitivity_embedding"]
        self._steps += [f"sensitivity_{layer.index:03d}" for layer in reference.architecture.layers]

    def losses(self, progress: Progress) -> list[list[float]]:
        """Mean KL divergence in nats [groups][candidates]."""
        layers = self.reference.architecture.layers
        done = self._resume_at()
        if done:
            progress.remark(f"Resuming the sensitivities after {self._steps[done - 1]}.")
        with progress.track("Sensitivity", len(self._steps) + 1) as track:
            track.advance(done)
            for index in range(done, len(self._steps)):
                if index:
                    self._block(index, layers[index - 1])
                else:
                    self._embedding()
                track.advance(1, f"block {index - 1}" if index else EMBEDDING_TAP)
            losses = self._followed(self._compare())
            track.advance(1, HEAD_TAP)
        return losses

    def forget(self) -> None:
        """Free what was committed, once the losses are safe elsewhere."""
        for step in self._steps:
            self.work.forget(step)

    def _resume_at(self) -> int:
        for index in range(len(self._steps), 0, -1):
            step = self._steps[index - 1]
            record = self.work.record(step) if self.work.has_activations(step, ORIGINAL) else None
            if record is not None:
                self._errors = {int(number): row for number, row in record["note"]["errors"].items()}
                return index
        return 0

    def _commit(self, step: str, original: Iterator[Tensor], trials: Iterator[Tensor]) -> None:
        self.work.commit(step, {}, {"errors": self._errors}, {ORIGINAL: original, TRIALS: trials})

    def _embedding(self) -> None:
        wanted, position = torch.unique(self.ids, return_inverse=True)
        rows = self.reference.embed(wanted)
        ones = rows.new_ones(self.reference.architecture.hidden_size)
        for number, group in enumerate(self.groups):
            if group.tap == EMBEDDING_TAP:
                self._errors[number] = [
                    float((_rounded(rows, form, ones) - rows).square().sum()) for form in group.candidates
                ]

        def trials() -> Iterator[Tensor]:
            for trial in self._trials:
                if self.groups[trial.group].tap == EMBEDDING_TAP:
                    yield _rounded(rows, trial.form, ones)[position]

        self._commit(self._steps[0], iter([rows[position]]), trials())

    def _block(self, index: int, layer: DecoderLayer) -> None:
        """Take every trial through the block ``layer``, where others begin."""
        before, block = self._steps[index - 1], self.reference.block(layer)
        hidden = self._read(before, ORIGINAL, 0)

        def trials() -> Iterator[Tensor]:
            for at, trial in enumerate(self._trials):
                left = self.groups[trial.group].layer
                if left is None or left < layer.index:
                    yield from self._through(block, self._read(before, TRIALS, at))
            for number, group in enumerate(self.groups):
                if group.layer == layer.index:
                    yield from self._leave(block, hidden, number)

        self._commit(self._steps[index], self._through(block, hidden), trials())
        self.work.drop_activations(before)

    def _through(self, block: Block, states: Tensor, weights: dict[str, Tensor] | None = None) -> Iterator[Tensor]:
        for part in torch.split(states, self._batch):
            yield block.forward(part, self._positions, weights)

    def _leave(self, block: Block, hidden: Tensor, number: int) -> Iterator[Tensor]:
        """Outputs of ``block`` with its group ``number`` in each format that is tried; the errors in every format."""
        group = self.groups[number]
        linears = block.layer.taps[group.tap]
        inputs = torch.cat([block.tap(group.tap, part, self._positions) for part in torch.split(hidden, self._batch)])
        inputs = inputs[:, self.prefix :].flatten(0, 1)
        importance = inputs.square().mean(0)
        inputs = _sampled(inputs)
        errors = self._errors[number] = [0.0] * len(group.candidates)
        for candidate, form in enumerate(group.candidates):
            weights = {}
            for linear in linears:
                rounded = self._round(linear, form, importance, inputs, keep=candidate in group.tried)
                errors[candidate] += rounded.error
                if rounded.weight is not None:
                    weights[linear.weight] = rounded.weight
            if weights:
                yield from self._through(block, hidden, weights)

    def _round(
        self, linear: Linear, form: Format, importance: Tensor, inputs: Tensor, *, keep: bool = False
    ) -> _Rounded:
        """Round ``linear`` and measure its error for ``inputs`` [n, K]; ``keep`` the rounded matrix or drop it."""
        error = norm = 0.0
        whole = inputs.new_empty(linear.out_features, linear.in_features) if keep else None
        count = max(64, self.memory.chunk_weights // linear.in_features)
        for start in range(0, linear.out_features, count):
            stop = min(start + count, linear.out_features)
            rows = self.reference.rows(linear.weight, start, stop)
            rounded = _rounded(rows, form, importance)
            if whole is not None:
                whole[start:stop] = rounded
            norm += float((inputs @ rows.T).square().sum())
            error += float((inputs @ rounded.sub_(rows).T).square().sum())
        return _Rounded(error / max(norm, 1e-30), whole)

    def _compare(self) -> list[dict[int, float]]:
        """Losses of the candidates that were tried."""
        architecture, last = self.reference.architecture, self._steps[-1]
        normed = self._normed(last, ORIGINAL, 0)
        outputs = Outputs(self.reference, normed, max(64, self.memory.chunk_weights // architecture.hidden_size))
        losses: list[dict[int, float]] = [{} for _ in self.groups]
        ones = normed.new_ones(architecture.hidden_size)
        together = compared_trials(self.memory.batch_tokens, self.ids.numel())
        for start in range(0, len(self._trials), together):
            batch = self._trials[start : start + together]
            changes = []
            for at, trial in enumerate(batch, start):
                states = self._normed(last, TRIALS, at)
                if architecture.tied and self.groups[trial.group].tap == EMBEDDING_TAP:
                    # A tied head is the embedding: it speaks with the same codes.
                    changes.append(of_states_and_head(outputs, states, _rounding(trial.form, ones)))
                else:
                    changes.append(of_states(outputs, states))
            for trial, loss in zip(batch, outputs.divergences(changes), strict=True):
                losses[trial.group][trial.candidate] = loss
        importance = normed.square().mean(0)
        for number, group in enumerate(self.groups):
            if group.tap == HEAD_TAP:
                forms = [group.candidates[candidate] for candidate in group.tried]
                found = outputs.divergences([of_head(outputs, _rounding(form, importance)) for form in forms])
                losses[number] = dict(zip(group.tried, found, strict=True))
                self._errors[number] = [
                    self._round(architecture.lm_head, form, importance, _sampled(normed)).error
                    for form in group.candidates
                ]
        return losses

    def _followed(self, tried: list[dict[int, float]]) -> list[list[float]]:
        """``tried``, and from it the losses of the formats alike."""
        losses = []
        for number, group in enumerate(self.groups):
            errors, row = self._errors[number], [0.0] * len(group.candidates)
            for candidate, alike in group.tried.items():
                row[candidate] = tried[number][candidate]
                for other in alike:
                    row[other] = row[candidate] * errors[other] / max(errors[candidate], 1e-30)
            losses.append(row)
        return losses

    def _read(self, step: str, stream: str, index: int) -> Tensor:
        count, length = self.ids.shape
        shape = (count, length, self.reference.architecture.hidden_size)
        return self.work.activations(step, stream, shape, self.reference.device).read(
            index * count, (index + 1) * count
        )

    def _normed(self, step: str, stream: str, index: int) -> Tensor:
        return self.reference.final_norm(self._read(step, stream, index))[:, self.prefix :].flatten(0, 1)


def _sampled(inputs: Tensor) -> Tensor:
    # A view would keep all of them in memory.
    return inputs[:: max(1, len(inputs) // _SAMPLED_POSITIONS)].clone()


def _rounded(rows: Tensor, form: Format, importance: Tensor) -> Tensor:
    # At 8 bits the search finds nothing to gain.
    return round_to_nearest(rows, form, importance if form.bits < 8 else None).dequantize()


def _rounding(form: Format, importance: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: _rounded(rows, form, importance)
