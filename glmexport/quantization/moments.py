"""The facts about the inputs of a tap that the solver needs: moments of the calibration text, and held-out values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.architecture.description import Linear
from glmexport.calibration.hessian import Hessian, SecondMoment
from glmexport.calibration.sequences import CalibrationSet
from glmexport.quantization.goal import Goal, Sample
from glmexport.quantization.largest import Seen
from glmexport.quantization.ranks import ALONE, Parcel, Ranks

#: Number of held-out positions that solutions are judged on; every further one would cost a product a matrix.
SAMPLE_POSITIONS = 2048


@dataclass(frozen=True)
class Measured:
    """The moments that the linears of a tap are solved from."""

    #: The Hessian [K, K] fp32, the mean of x x^T.
    hessian: Tensor
    sample: Sample | None
    #: The goal of all of them; None without an asymmetric target.
    goal: Goal | None = None
    #: The largest number of the quantized model's activations on the way there, where it was looked for.
    largest: Seen | None = None


class Moments:
    """An accumulator over the calibration text of what the linears of a tap are solved from.

    Coarse ones are of inputs rounded to bf16. Each of the ``ranks`` keeps some slabs of both moments, to which it adds
    all of the text in order.

    With an asymmetric target it also takes what is wanted: the input of ``linears`` in the original; or, where
    ``weight`` [M, K] is given, the output that the only one of them ought to have. What W makes of the inputs is then
    taken off at the end, from the moments, which spares a product a position: E[(y - W x) x^T] = E[y x^T] - W H.
    """

    def __init__(
        self,
        calibration: CalibrationSet,
        linears: tuple[Linear, ...],
        *,
        asymmetric: bool,
        weight: Tensor | None,
        device: torch.device,
        coarse: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.calibration = calibration
        self.ranks = ranks
        size = linears[0].in_features
        self._hessian = Hessian(size, device, coarse=coarse, rank=ranks.rank, size=ranks.size)
        self._cross: SecondMoment | None = None
        if asymmetric:
            rows = size if weight is None else len(weight)
            self._cross = SecondMoment(rows, size, device, coarse=coarse, rank=ranks.rank, size=ranks.size)
        self._weight = weight
        self._weights = calibration.weights().to(device)
        self._held = calibration.selection.to(device)
        self._stride = -(-calibration.selection_tokens // SAMPLE_POSITIONS) or 1
        self._held_inputs: list[Tensor] = []
        self._held_wanted: list[Tensor] = []
        self._held_weights: list[Tensor] = []

    def add(self, start: int, inputs: Tensor, wanted: Tensor | None) -> None:
        """Add sequences from ``start`` on: ``inputs`` [batch, length, K], ``wanted`` [batch, length, M], fp32."""
        held = self._held[start : start + len(inputs)]
        weights = self._weights[start : start + len(inputs)]
        fitted = self._weighted(inputs, ~held, weights)
        self._hessian.add(fitted)
        chosen = self._chosen(inputs, held)
        self._held_inputs.append(chosen.flatten(0, 1))
        self._held_weights.append(weights[held, None].expand(chosen.shape[:2]).flatten())
        if wanted is not None and self._cross is not None:
            if self._weight is None:
                wanted = wanted - inputs
            self._cross.add(self._weighted(wanted, ~held, weights), fitted)
            self._held_wanted.append(self._chosen(wanted, held).flatten(0, 1))

    def _weighted(self, values: Tensor, fitted: Tensor, weights: Tensor) -> Tensor:
        """Return rows [n, features] of the positions that are ``fitted`` to, times the square root of their weight."""
        rows = values[fitted, self.calibration.prefix :]
        return rows.mul_(weights[fitted].sqrt()[:, None, None]).flatten(0, 1)

    def _chosen(self, values: Tensor, held: Tensor) -> Tensor:
        return values[held, self.calibration.prefix :: self._stride]

    def result(self, largest: Seen | None = None) -> Measured:
        """Return what was measured; ``largest`` is the largest number that was seen meanwhile."""
        share_slabs(self._hessian, self.ranks)
        hessian, sample = self._hessian.matrix(), None
        if bool(self.calibration.selection.any()):
            sample = Sample(torch.cat(self._held_inputs), torch.cat(self._held_weights))
        if self._cross is None or sample is None:
            return Measured(hessian, sample, largest=largest)
        held = torch.cat(self._held_wanted)
        if self._weight is not None:
            self._cross.subtract(self._weight, hessian)
            held.addmm_(sample.inputs, self._weight.T, alpha=-1)
        share_slabs(self._cross, self.ranks)
        goal = Goal(self._cross.matrix, held, of_inputs=self._weight is None)
        return Measured(hessian, sample, goal, largest)


def share_slabs(moment: Hessian | SecondMoment, ranks: Ranks) -> None:
    """Give every rank the slabs of ``moment`` that the others keep."""
    if ranks.alone:
        return
    for slab, parcel in ranks.each(moment.slabs, lambda slab: Parcel((moment.slab(*slab),))):
        (rows,) = parcel.tensors
        if slab not in moment.kept and rows is not None:
            moment.slab(*slab).copy_(rows)
