"""The cost of each group of matrices in each format: the KL divergence it causes alone, everything else original.

One pass over the weights serves all trials. Every trial is a copy of the probe's activations that leaves the
original's at its group and goes through the rest of the model with original weights; divergences this small add up.
The trial's matrices are rounded to nearest on a searched grid: what GPTQ then gains is nearly the same factor in all.
Routed experts of a layer are tried together (see ``expert_probe``).
Not all formats of the same bits are tried (``TieGroup.tried``): a small divergence is proportional to the energy of
the error at the matrices' outputs, which takes no pass through the model to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.architecture.description import DecoderLayer, Linear
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.calibration.sequences import CalibrationSet
from glmexport.formats.codecs import codec_of
from glmexport.formats.nearest import round_to_nearest
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Format
from glmexport.quantization.allocation import EMBEDDING_TAP, HEAD_TAP, TieGroup, tried_together
from glmexport.quantization.deviation import Outputs, of_head, of_states, of_states_and_head
from glmexport.quantization.expert_probe import ExpertProbe, share
from glmexport.quantization.memory import MIXED_POSITIONS, MemoryPlan, compared_trials
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.reference import Block, Reference

#: Number of tokens of a probe sequence.
_LONGEST = 256
#: Number of probe positions on which formats of the same bits are compared.
_SAMPLED_POSITIONS = 512
ORIGINAL, TRIALS = "original", "trials"


def probe_ids(calibration: CalibrationSet, tokens: int) -> Tensor:
    """Return token ids [sequences, length] of about ``tokens`` held-out tokens, spread over the languages."""
    held = calibration.ids[calibration.selection] if bool(calibration.selection.any()) else calibration.ids
    length = min(_LONGEST, held.shape[1])
    wanted = max(1, tokens // length)
    stride = max(1, len(held) // wanted)
    return held[::stride][:wanted, :length]


@dataclass(frozen=True)
class _Trial:
    #: The groups that are tried together.
    groups: tuple[int, ...]
    candidate: int
    form: Format


@dataclass(frozen=True)
class _Rounded:
    """A rounded matrix [N, K] fp32, if it was kept, and the energy of the error at its output, as a share of it."""

    error: float
    weight: Tensor | None


class Probe:
    """The probe text on its way through the original, and through every trial.

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
        self._together = tried_together(groups)
        #: The trials in the order of the model, so that those that have left the original after some block come first.
        self._trials = [
            _Trial(members, candidate, group.candidates[candidate])
            for members in self._together
            if (group := groups[members[0]]).tap != HEAD_TAP
            for candidate in group.tried
        ]
        #: The error energy at the sampled outputs, by group and candidate.
        self._errors: dict[int, list[float]] = {}
        #: The groups of experts that the probe hardly reaches (``ExpertTrials.cold``).
        self.cold: list[int] = []
        self._steps = ["sensitivity_embedding"]
        self._steps += [f"sensitivity_{layer.index:03d}" for layer in reference.architecture.layers]

    def losses(self, progress: Progress) -> list[list[float]]:
        """Return the mean KL divergence in nats [groups][candidates]."""
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
                self.cold = record["note"].get("cold", [])
                return index
        return 0

    def _commit(self, step: str, original: Iterator[Tensor], trials: Iterator[Tensor]) -> None:
        self.work.commit(step, {}, {"errors": self._errors, "cold": self.cold}, {ORIGINAL: original, TRIALS: trials})

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
                if self._first(trial).tap == EMBEDDING_TAP:
                    yield _rounded(rows, trial.form, ones)[position]

        self._commit(self._steps[0], iter([rows[position]]), trials())

    def _block(self, index: int, layer: DecoderLayer) -> None:
        """Take every trial through the block ``layer``, where others begin."""
        before, block = self._steps[index - 1], self.reference.block(layer)
        hidden = self._read(before, ORIGINAL, 0)

        def left() -> Iterator[Tensor]:
            for at, trial in enumerate(self._trials):
                since = self._first(trial).layer
                if since is None or since < layer.index:
                    yield self._read(before, TRIALS, at)

        def trials() -> Iterator[Tensor]:
            yield from self._each_through(block, left())
            for number, group in enumerate(self.groups):
                if group.layer == layer.index and group.expert_part is None:
                    yield from self._leave(block, hidden, number)
            if isinstance(layer.mlp, MixtureOfExperts):
                yield from self._leave_experts(block, hidden)

        self._commit(self._steps[index], self._through(block, hidden), trials())
        self.work.drop_activations(before)

    def _first(self, trial: _Trial) -> TieGroup:
        return self.groups[trial.groups[0]]

    def _each_through(self, block: Block, states: Iterator[Tensor]) -> Iterator[Tensor]:
        """Return the outputs of ``block`` for each of ``states``; experts are read for many of them at a time."""
        if not block.layer.mlp.routed:
            for each in states:
                yield from self._through(block, each)
            return
        waiting: list[Tensor] = []
        for each in states:
            for part in torch.split(each, self._batch):
                waiting.append(block.attended(part, self._positions, None)[0])
            if sum(len(part) for part in waiting) * each.shape[1] >= MIXED_POSITIONS:
                yield block.through(block.layer.branches[1], torch.cat(waiting))
                waiting = []
        if waiting:
            yield block.through(block.layer.branches[1], torch.cat(waiting))

    def _through(self, block: Block, states: Tensor, weights: dict[str, Tensor] | None = None) -> Iterator[Tensor]:
        for part in torch.split(states, self._batch):
            yield block.forward(part, self._positions, weights)

    def _leave(self, block: Block, hidden: Tensor, number: int) -> Iterator[Tensor]:
        """Return outputs of ``block`` with group ``number`` in each tried format, and the errors in every format."""
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

    def _leave_experts(self, block: Block, hidden: Tensor) -> Iterator[Tensor]:
        """Return outputs of ``block`` with its routed experts in each tried format: one of their parts, then the other.

        The errors of every expert in every format are noted.
        """
        layer, branch = block.layer, block.layer.branches[1]
        assert branch.output_norm is None
        together = [members for members in self._together if self._is_expert_of(layer, members)]
        first = self.groups[together[0][0]]
        parts = torch.split(hidden, self._batch)
        stream = torch.cat([block.attended(part, self._positions, None)[0] for part in parts])
        output = block.through(branch, stream)
        counted = (torch.arange(hidden.shape[1], device=hidden.device) >= self.prefix).expand(hidden.shape[:2])
        probe = ExpertProbe(self.reference, block, block.normed(branch, stream).flatten(0, 1), counted.flatten())
        found = probe.trials(first.candidates, tuple(first.tried), self._whole_rounded)
        for members in together:
            part = self.groups[members[0]].expert_part
            assert part is not None
            self._errors.update(zip(members, found.errors[part], strict=True))
            self.cold += [members[expert] for expert in found.cold]
            for change in found.changes[part].values():
                yield output + change.reshape(output.shape)

    def _is_expert_of(self, layer: DecoderLayer, members: tuple[int, ...]) -> bool:
        group = self.groups[members[0]]
        return group.layer == layer.index and group.expert_part is not None

    def _whole_rounded(self, matrix: Tensor, form: Format, importance: Tensor) -> Tensor:
        chunks = torch.split(matrix, max(64, self.memory.chunk_weights // matrix.shape[1]))
        return torch.cat([_rounded(chunk, form, importance) for chunk in chunks])

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

    def _compare(self) -> dict[int, dict[int, float]]:
        """Return the losses of the candidates that were tried, by the first of the groups that were tried together."""
        architecture, last = self.reference.architecture, self._steps[-1]
        normed = self._normed(last, ORIGINAL, 0)
        outputs = Outputs(self.reference, normed, max(64, self.memory.chunk_weights // architecture.hidden_size))
        losses: dict[int, dict[int, float]] = {members[0]: {} for members in self._together}
        ones = normed.new_ones(architecture.hidden_size)
        together = compared_trials(self.memory.batch_tokens, self.ids.numel())
        for start in range(0, len(self._trials), together):
            batch = self._trials[start : start + together]
            changes = []
            for at, trial in enumerate(batch, start):
                states = self._normed(last, TRIALS, at)
                if architecture.tied and self._first(trial).tap == EMBEDDING_TAP:
                    # A tied head is the embedding: it has the same codes.
                    changes.append(of_states_and_head(outputs, states, _rounding(trial.form, ones)))
                else:
                    changes.append(of_states(outputs, states))
            for trial, loss in zip(batch, outputs.divergences(changes), strict=True):
                losses[trial.groups[0]][trial.candidate] = loss
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

    def _followed(self, tried: dict[int, dict[int, float]]) -> list[list[float]]:
        """Return ``tried`` with the losses of other formats that follow from it, each group with its share."""
        losses = [[0.0] * len(group.candidates) for group in self.groups]
        for members in self._together:
            for candidate, alike in self.groups[members[0]].tried.items():
                shares = share([self._errors[number][candidate] for number in members])
                for number, part in zip(members, shares, strict=True):
                    errors, row = self._errors[number], losses[number]
                    row[candidate] = part * tried[members[0]][candidate]
                    for other in alike:
                        row[other] = row[candidate] * errors[other] / max(errors[candidate], 1e-30)
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
    # A view would keep all rows in memory.
    return inputs[:: max(1, len(inputs) // _SAMPLED_POSITIONS)].clone()


def _rounded(rows: Tensor, form: Format, importance: Tensor) -> Tensor:
    return round_to_nearest(rows, form, importance if codec_of(form).searched else None).dequantize()


def _rounding(form: Format, importance: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: _rounded(rows, form, importance)
