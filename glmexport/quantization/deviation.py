"""KL divergence of many slightly changed models from one original, without ever holding a whole row of logits.

With p the original's probabilities and d the change of the logits, KL(P || Q) = ln sum p e^d - sum p d. Written as
ln(1 + m + a) - m with m = sum p d and a = sum p (e^d - 1 - d), every term is as small as the divergence itself or
cancels to second order, so that fp32 logits suffice and both sums can be taken over slabs of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from glmexport.quantization.memory import COMPARED_POSITIONS
from glmexport.reference.reference import Reference

#: A function from a slab [n, H] of the lm_head to inputs [P, K] and a matrix [n, K], whose product is the change of the
#: slab's logits.
Change = Callable[[Tensor], tuple[Tensor, Tensor]]

#: Largest rise of a logit: beyond it the model is broken in any case, and e^d must not overflow.
_LARGEST = 80.0


class Outputs:
    """The original's next-token distributions at ``normed`` [P, H] fp32, the states after the final norm."""

    def __init__(self, reference: Reference, normed: Tensor, slab_rows: int) -> None:
        self.normed = normed
        self._reference = reference
        self._slab_rows = slab_rows
        self._lse = normed.new_full((len(normed),), -math.inf)
        for slab in self._slabs():
            for span in self._spans():
                logits = normed[span] @ slab.T
                self._lse[span] = torch.logaddexp(self._lse[span], logits.logsumexp(-1))

    def divergences(self, changes: Sequence[Change]) -> list[float]:
        """Return the mean KL divergence in nats of each of ``changes``, by one pass over the lm_head."""
        first = self.normed.new_zeros(len(changes), len(self.normed), dtype=torch.float64)
        second = torch.zeros_like(first)
        for slab in self._slabs():
            pairs = [change(slab) for change in changes]
            for span in self._spans():
                probabilities = (self.normed[span] @ slab.T).sub_(self._lse[span, None]).exp_()
                for index, (inputs, matrix) in enumerate(pairs):
                    change = (inputs[span] @ matrix.T).clamp_(max=_LARGEST)
                    first[index, span] += torch.linalg.vecdot(probabilities, change)
                    second[index, span] += torch.linalg.vecdot(probabilities, change.expm1().sub_(change))
        # Rounding may leave a vanishing divergence below zero.
        return (torch.log1p(first + second) - first).clamp_(min=0).mean(1).tolist()

    def _slabs(self) -> Iterator[Tensor]:
        head = self._reference.architecture.lm_head
        for start in range(0, head.out_features, self._slab_rows):
            stop = min(start + self._slab_rows, head.out_features)
            yield self._reference.rows(head.weight, start, stop)

    def _spans(self) -> Iterator[slice]:
        for start in range(0, len(self.normed), COMPARED_POSITIONS):
            yield slice(start, start + COMPARED_POSITIONS)


def of_states(outputs: Outputs, states: Tensor) -> Change:
    """Return the change by other ``states`` [P, H] after the final norm, with the original's lm_head."""
    difference = states - outputs.normed
    return lambda slab: (difference, slab)


def of_head(outputs: Outputs, rounded: Callable[[Tensor], Tensor]) -> Change:
    """Return the change by the lm_head as ``rounded`` makes it, slab by slab, with the original's states."""
    return lambda slab: (outputs.normed, rounded(slab) - slab)


def of_states_and_head(outputs: Outputs, states: Tensor, rounded: Callable[[Tensor], Tensor]) -> Change:
    """Return the change by other states and a rounded lm_head together."""
    inputs = torch.cat([states, states - outputs.normed], 1)

    def change(slab: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, torch.cat([rounded(slab) - slab, slab], 1)

    return change
