"""The trials of a layer's routed experts under a budget, and each expert's part of the loss of one.

Trying every expert by itself would take a pass through the model each. All of a layer are tried at once, gate and up
projections apart from down projections, and each answers for its share of the change that they cause together: its
coverage times its error. The error is the mean square of what rounding changes at the expert's output, weighted as the
router weights it; the coverage is how much of the text chooses it.

Half of the coverage is that of an even spread. Routers are trained until the experts have equal shares of their text
(see ``Router``), and a probe is a sliver of all text: an expert that it leaves cold is needed elsewhere. Without any
position of its own, an expert's error is that at positions that chose others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.architecture.description import GatedMlp, Linear
from glmexport.architecture.experts import EXPERT_INPUT, EXPERT_OUTPUT, MixtureOfExperts
from glmexport.foundation.recipe import Format
from glmexport.quantization.memory import POOL_POSITIONS
from glmexport.reference.reference import Block, Reference

#: Number of an expert's own positions that all of the pool counts for.
_PRIOR = 16.0
#: An expert with less than this share of an even spread over the probe is cold.
_COLD = 0.25

#: A function that rounds a matrix [N, K] fp32 to a format, with the weight [K] of each column's squared error.
Rounding = Callable[[Tensor, Format, Tensor], Tensor]


@dataclass(frozen=True)
class ExpertTrials:
    """The effects of rounding the experts of a layer, by the part of them (``Linear.part``) that is rounded."""

    #: The change of the layer's output [positions, hidden], by candidate that is tried.
    changes: dict[str, dict[int, Tensor]]
    #: The share of each expert in a change, up to a factor: [experts][candidates].
    errors: dict[str, list[list[float]]]
    #: The cold experts: the text is too little to tell them from others.
    cold: tuple[int, ...]


@dataclass(frozen=True)
class _Choices:
    """The positions [n] int64 that chose an expert, its weights [n] there, and what a squared error counts [n]."""

    positions: Tensor
    weights: Tensor
    counts: Tensor


class ExpertProbe:
    """The routed experts of one layer at the probe text, read and rounded one at a time.

    Args:
        reference: the original.
        block: the layer.
        normed: what its mixture reads, [positions, hidden] fp32.
        counted: which positions count, [positions] bool.
    """

    def __init__(self, reference: Reference, block: Block, normed: Tensor, counted: Tensor) -> None:
        assert isinstance(block.layer.mlp, MixtureOfExperts)
        self._reference = reference
        self._block = block
        self._mixture = block.layer.mlp
        self._normed = normed
        self._experts, self._weights = block.route(normed)
        square = self._weights.square() * counted[:, None]
        #: The mean over the choices that count is one.
        self._counts = square * (int(counted.sum()) * self._weights.shape[1] / square.sum())
        pool = counted.nonzero()[:, 0]
        self._pool = normed[pool[:: -(-len(pool) // POOL_POSITIONS)]]

    def trials(self, candidates: Sequence[Format], tried: Sequence[int], rounding: Rounding) -> ExpertTrials:
        """Round every expert in every one of ``candidates``; of those ``tried`` the change is kept."""
        parts = (EXPERT_INPUT, EXPERT_OUTPUT)
        changes = {part: {index: torch.zeros_like(self._normed) for index in tried} for part in parts}
        errors: dict[str, list[list[float]]] = {part: [] for part in parts}
        masses = []
        for index, mlp in enumerate(self._mixture.experts):
            own = self._chosen(index)
            masses.append(float(own.counts.sum()))
            rows = torch.cat([self._normed[own.positions], self._pool])
            counts = torch.cat([own.counts, rows.new_full((len(self._pool),), _PRIOR / len(self._pool))])
            expert = _Expert(self._reference, self._block, mlp, rows, counts / counts.sum())
            for part, linear in zip(parts, mlp.linears, strict=True):
                found = []
                for candidate, form in enumerate(candidates):
                    change = expert.change(linear, form, rounding)
                    found.append(expert.error(change))
                    if candidate in tried:
                        added = change[: len(own.positions)].mul_(own.weights[:, None])
                        changes[part][candidate].index_add_(0, own.positions, added)
                errors[part].append(found)
        mean = sum(masses) / len(masses)
        for rows_of_part in errors.values():
            for mass, row in zip(masses, rows_of_part, strict=True):
                row[:] = [coverage(mass, mean) * error for error in row]
        cold = tuple(index for index, mass in enumerate(masses) if mass < _COLD * mean)
        return ExpertTrials(changes, errors, cold)

    def _chosen(self, index: int) -> _Choices:
        positions, slots = (self._experts == index).nonzero(as_tuple=True)
        return _Choices(positions, self._weights[positions, slots], self._counts[positions, slots])


class _Expert:
    """One expert at ``rows`` [n, hidden], of which each counts ``counts`` [n], in sum one."""

    def __init__(self, reference: Reference, block: Block, mlp: GatedMlp, rows: Tensor, counts: Tensor) -> None:
        self._block = block
        self._mlp = mlp
        self._matrices = {linear: reference.read(linear.weight) for linear in mlp.linears}
        self._counts = counts
        inner = block.gated(rows @ self._matrices[mlp.gate_up].T)
        #: The input of each matrix.
        self._inputs = {mlp.gate_up: rows, mlp.down: inner}
        self._importance = {linear: counts @ inputs.square() for linear, inputs in self._inputs.items()}
        self._output = inner @ self._matrices[mlp.down].T

    def change(self, linear: Linear, form: Format, rounding: Rounding) -> Tensor:
        """Return what rounding ``linear`` changes at the output [n, hidden]."""
        rounded = rounding(self._matrices[linear], form, self._importance[linear])
        given = self._inputs[linear] @ rounded.T
        if linear is self._mlp.gate_up:
            given = self._block.gated(given) @ self._matrices[self._mlp.down].T
        return given.sub_(self._output)

    def error(self, change: Tensor) -> float:
        """Return the mean square of a ``change`` [n, hidden]."""
        return float(self._counts @ change.square().sum(1))


def coverage(mass: float, mean: float) -> float:
    """Return what an expert of so much ``mass`` counts, where an even spread would give each the ``mean``."""
    return (mass + mean) / 2


def share(errors: Sequence[float]) -> list[float]:
    """Return the share of each of ``errors`` in their sum; equal shares of nothing."""
    total = sum(errors)
    return [error / total if total > 0 else 1 / len(errors) for error in errors]
