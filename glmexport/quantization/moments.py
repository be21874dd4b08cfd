"""What the solver needs to know about the inputs of a tap: moments of the calibration text, and held-out values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.architecture import Linear
from glmexport.calibration import CalibrationSet, CrossMoment, Hessian
from glmexport.quantization.goal import Goal, Sample

#: Held-out positions that solutions are judged on; every further one would cost a product a matrix.
SAMPLE_POSITIONS = 2048


@dataclass(frozen=True)
class Measured:
    """What the linears of a tap are solved from: ``goals`` by weight key, without an asymmetric target empty."""

    hessian: Hessian
    sample: Sample | None
    goals: dict[str, Goal]


class Moments:
    """Accumulates them over the calibration text.

    ``of_inputs``: differences are of the inputs of ``linears``, and not of the output of the only one (see ``Goal``).
    """

    def __init__(
        self, calibration: CalibrationSet, linears: tuple[Linear, ...], *, asymmetric: bool, of_inputs: bool
    ) -> None:
        self.calibration = calibration
        self.linears = linears
        self.hessian = Hessian(linears[0].in_features)
        differences = linears[0].in_features if of_inputs else linears[0].out_features
        self._cross = CrossMoment(differences, linears[0].in_features) if asymmetric else None
        self._of_inputs = of_inputs
        self._weights = calibration.weights()
        self._stride = -(-calibration.selection_tokens // SAMPLE_POSITIONS) or 1
        self._held_inputs: list[Tensor] = []
        self._held_differences: list[Tensor] = []
        self._held_weights: list[Tensor] = []

    def add(self, start: int, inputs: Tensor, difference: Tensor | None) -> None:
        """Add sequences from ``start`` on: ``inputs`` [batch, length, K], ``difference`` [batch, length, M], fp32.

        Without an asymmetric target there is no difference.
        """
        stop, prefix = start + len(inputs), self.calibration.prefix
        held = self.calibration.selection[start:stop]
        weights = self._weights[start:stop]
        inputs = inputs[:, prefix:]
        self.hessian.add(inputs[~held], weights[~held])
        chosen = inputs[held][:, :: self._stride]
        self._held_inputs.append(chosen.flatten(0, 1))
        self._held_weights.append(weights[held, None].expand(chosen.shape[:2]).flatten())
        if difference is not None and self._cross is not None:
            difference = difference[:, prefix:]
            self._cross.add(difference[~held], inputs[~held], weights[~held])
            self._held_differences.append(difference[held][:, :: self._stride].flatten(0, 1))

    def result(self) -> Measured:
        """What was measured."""
        sample = None
        if bool(self.calibration.selection.any()):
            sample = Sample(torch.cat(self._held_inputs), torch.cat(self._held_weights))
        if self._cross is None:
            return Measured(self.hessian, sample, {})
        goal = Goal(self._cross.matrix, torch.cat(self._held_differences), self._of_inputs)
        return Measured(self.hessian, sample, {linear.weight: goal for linear in self.linears})
