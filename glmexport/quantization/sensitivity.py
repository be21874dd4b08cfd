"""What each group of matrices costs in each format: the KL divergence it causes alone, everything else original.

One pass over the weights serves all trials. Every trial is a copy of the probe's activations that leaves the
original's at its group and goes through the rest of the model with original weights; divergences this small add up.
The trial's matrices are rounded to nearest on a searched grid: what GPTQ then gains is nearly the same factor in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

from glmexport.architecture import Linear, Reference
from glmexport.calibration import CalibrationSet
from glmexport.divergence import kl_divergence
from glmexport.progress import Progress
from glmexport.quantization.allocation import EMBEDDING_TAP, HEAD_TAP, TieGroup
from glmexport.quantization.linear import QuantizedLinear
from glmexport.quantization.nearest import round_to_nearest
from glmexport.recipe import Format

#: Positions whose logits are compared at a time, and tokens of a probe sequence.
_POSITIONS, _LONGEST = 128, 256
_CHUNK_WEIGHTS = 1 << 24


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


class Probe:
    """The probe's text on its way through the original, and through every trial."""

    def __init__(self, reference: Reference, ids: Tensor, prefix: int, groups: Sequence[TieGroup]) -> None:
        self.reference = reference
        self.ids = ids
        self.prefix = prefix
        self.groups = groups
        self._trials: list[_Trial] = []
        self._positions = reference.position_embeddings(ids.shape[1])
        self._count = ids.numel() * reference.architecture.hidden_size

    def losses(self, directory: Path, progress: Progress) -> list[list[float]]:
        """Mean KL divergence in nats [groups][candidates]; the trials are kept in a nameless file in ``directory``."""
        architecture = self.reference.architecture
        with (
            TemporaryFile(dir=directory) as self._file,
            progress.track("Sensitivity", len(architecture.layers)) as track,
        ):
            hidden = self.reference.embed(self.ids)
            self._embedding()
            for layer in architecture.layers:
                block = self.reference.block(layer)
                for index in range(len(self._trials)):
                    self._save(index, block.forward(self._load(index), self._positions))
                for number, group in enumerate(self.groups):
                    if group.layer != layer.index:
                        continue
                    linears = layer.taps[group.tap]
                    importance = block.tap(group.tap, hidden, self._positions)[:, self.prefix :].square().mean((0, 1))
                    for candidate, form in enumerate(group.candidates):
                        weights = {linear.weight: self._rounded(linear, form, importance) for linear in linears}
                        self._add(number, candidate, form, block.forward(hidden, self._positions, weights))
                hidden = block.forward(hidden, self._positions)
                track.advance(1, f"block {layer.index}")
            return self._compare(hidden)

    def _embedding(self) -> None:
        for number, group in enumerate(self.groups):
            if group.tap == EMBEDDING_TAP:
                for candidate, form in enumerate(group.candidates):
                    wanted, position = torch.unique(self.ids, return_inverse=True)
                    rows = self.reference.embed(wanted)
                    rounded = round_to_nearest(rows, form, torch.ones(rows.shape[1])).dequantize()
                    self._add(number, candidate, form, rounded[position])

    def _compare(self, hidden: Tensor) -> list[list[float]]:
        architecture, head = self.reference.architecture, self.reference.architecture.lm_head
        normed = self.reference.final_norm(hidden)[:, self.prefix :]
        losses = [[0.0] * len(group.candidates) for group in self.groups]
        for index, trial in enumerate(self._trials):
            states = self.reference.final_norm(self._load(index))[:, self.prefix :]
            # A tied head is the embedding: it speaks with the same codes.
            tied = architecture.tied and self.groups[trial.group].tap == EMBEDDING_TAP
            own = self._head(trial.form, torch.ones(head.in_features)) if tied else None
            losses[trial.group][trial.candidate] = self._mean_kl(normed, states, own)
        importance = normed.square().mean((0, 1))
        for number, group in enumerate(self.groups):
            if group.tap == HEAD_TAP:
                for candidate, form in enumerate(group.candidates):
                    losses[number][candidate] = self._mean_kl(normed, normed, self._head(form, importance))
        return losses

    def _mean_kl(self, original: Tensor, states: Tensor, head: QuantizedLinear | None) -> float:
        total = 0.0
        ours, theirs = original.flatten(0, 1), states.flatten(0, 1)
        for start in range(0, len(ours), _POSITIONS):
            span = slice(start, start + _POSITIONS)
            log_p = self.reference.logits(ours[span]).double().log_softmax(-1)
            logits = self.reference.logits(theirs[span]) if head is None else head.apply(theirs[span])
            total += float(kl_divergence(log_p, logits.double().log_softmax(-1)).sum())
        return total / len(ours)

    def _rounded(self, linear: Linear, form: Format, importance: Tensor) -> Tensor:
        return self._quantized(linear, form, importance).dequantize()

    def _head(self, form: Format, importance: Tensor) -> QuantizedLinear:
        return self._quantized(self.reference.architecture.lm_head, form, importance)

    def _quantized(self, linear: Linear, form: Format, importance: Tensor) -> QuantizedLinear:
        rows = max(1, _CHUNK_WEIGHTS // linear.in_features)
        # At 8 bits the search finds nothing to gain.
        weighting = importance if form.bits < 8 else None
        checkpoint = self.reference.checkpoint
        return QuantizedLinear.concatenate(
            [
                round_to_nearest(
                    checkpoint.rows(linear.weight, start, min(start + rows, linear.out_features)), form, weighting
                )
                for start in range(0, linear.out_features, rows)
            ]
        )

    def _add(self, group: int, candidate: int, form: Format, states: Tensor) -> None:
        self._trials.append(_Trial(group, candidate, form))
        self._save(len(self._trials) - 1, states)

    def _save(self, index: int, states: Tensor) -> None:
        self._file.seek(index * self._count * 4)
        self._file.write(states.contiguous().numpy().data.cast("B"))

    def _load(self, index: int) -> Tensor:
        self._file.seek(index * self._count * 4)
        buffer = bytearray(self._file.read(self._count * 4))
        return torch.frombuffer(buffer, dtype=torch.float32).reshape(*self.ids.shape, -1)
