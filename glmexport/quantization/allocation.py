"""One format for every group of matrices, so that the least is lost within a number of bits: exactly, by ILP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmexport.architecture.description import Architecture
from glmexport.formats.codecs import codec_of, stored_bits
from glmexport.formats.plan import FormatPlan
from glmexport.foundation.errors import InputError
from glmexport.foundation.recipe import Budget, Format, Recipe


@dataclass(frozen=True)
class TieGroup:
    """Matrices that share a format: those of one tap (the runtime stores query, key and value as one), or one alone."""

    name: str
    #: None for the embedding and the lm_head.
    layer: int | None
    tap: str
    shapes: dict[str, tuple[int, int]]
    #: Formats of the budget that the runtime has kernels for here.
    candidates: tuple[Format, ...]

    def bits(self, form: Format) -> int:
        """Stored bits of all its matrices."""
        return sum(stored_bits(shape, form) for shape in self.shapes.values())

    @property
    def tried(self) -> dict[int, tuple[int, ...]]:
        """Candidates whose loss is measured, each with those whose loss follows from it, by index.

        Between group sizes of the same bits the error changes its size, but hardly its kind: the finest is tried.
        """
        alike: dict[tuple[int, bool], list[int]] = {}
        for index, form in enumerate(self.candidates):
            alike.setdefault((form.bits, form.symmetric), []).append(index)
        tried = {}
        for members in alike.values():
            finest = min(members, key=lambda index: self.candidates[index].group_size)
            tried[finest] = tuple(index for index in members if index != finest)
        return dict(sorted(tried.items()))


EMBEDDING_TAP, HEAD_TAP = "embedding", "lm_head"


def tie_groups(architecture: Architecture, recipe: Recipe) -> Iterator[TieGroup]:
    """Yield the groups of every part that ``recipe`` quantizes, in the order of the model."""
    budget, plan = recipe.budget, FormatPlan.of(architecture, recipe)
    assert budget is not None
    if plan.form(architecture.embedding) is not None:
        shape = (architecture.vocabulary_size, architecture.hidden_size)
        fitting = tuple(
            form for form in budget.candidates if shape[1] % form.group_size == 0 and codec_of(form).looked_up
        )
        yield TieGroup(EMBEDDING_TAP, None, EMBEDDING_TAP, {architecture.embedding: shape}, fitting)
    for layer in architecture.layers:
        for tap, linears in layer.taps.items():
            shapes = {linear.weight: (linear.out_features, linear.in_features) for linear in linears}
            yield TieGroup(f"block {layer.index} {linears[0].part}", layer.index, tap, shapes, budget.candidates)
    head = architecture.lm_head
    if plan.form(head.weight) is not None and not architecture.tied:
        shape = (head.out_features, head.in_features)
        yield TieGroup(HEAD_TAP, None, HEAD_TAP, {head.weight: shape}, budget.candidates)


def available_bits(architecture: Architecture, recipe: Recipe) -> int:
    """Bits that the budget leaves for the groups: without what stays in full precision."""
    budget = recipe.budget
    assert budget is not None
    shapes = architecture.shapes()
    quantized = {key for group in tie_groups(architecture, recipe) for key in group.shapes}
    rest = sum(stored_bits(shape, None) for key, shape in shapes.items() if key not in quantized)
    return total_bits(architecture, budget) - rest


def require_fit(architecture: Architecture, recipe: Recipe) -> None:
    """Whether any choice of formats keeps within the recipe's budget.

    Raises:
        InputError: even the smallest candidates need more.
    """
    least = sum(min(map(group.bits, group.candidates)) for group in tie_groups(architecture, recipe))
    available = available_bits(architecture, recipe)
    if least > available:
        raise InputError(
            f"The budget leaves {max(available, 0) / 8 / 2**20:,.1f} MiB for the quantized matrices, "
            f"and their smallest formats need {least / 8 / 2**20:,.1f} MiB.",
            next_step="Give a larger --size or --bpw, or a recipe whose [budget] has smaller candidates.",
        )


def probe_bytes(architecture: Architecture, recipe: Recipe) -> int:
    """Disk that the trials of a budget take: all of them after one block and, while it is written, the next."""
    if recipe.budget is None:
        return 0
    trials = sum(len(group.tried) for group in tie_groups(architecture, recipe))
    return 2 * (trials + 1) * recipe.budget.probe_tokens * architecture.hidden_size * 4


def total_bits(architecture: Architecture, budget: Budget) -> int:
    """Bits that the budget allows for every weight."""
    if budget.bundle_bytes is not None:
        return 8 * (budget.bundle_bytes - architecture.rotary_bytes)
    assert budget.bits_per_weight is not None
    weights = sum(int(np.prod(shape)) for shape in architecture.shapes().values())
    return int(budget.bits_per_weight * weights)


def allocate(losses: Sequence[Sequence[float]], bits: Sequence[Sequence[int]], available: int) -> list[int]:
    """The candidate of every group that minimises the sum of losses with the sum of bits within ``available``.

    Args:
        losses: [groups][candidates], at least 0.
        bits: likewise.
        available: in all.

    Raises:
        ValueError: even the smallest candidates need more.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if sum(min(row) for row in bits) > available:
        raise ValueError(f"no choice of candidates fits {available} bits")
    owner = [group for group, row in enumerate(losses) for _ in row]
    choose: NDArray[np.float64] = np.zeros((len(losses), len(owner)))
    choose[owner, np.arange(len(owner))] = 1
    cost = np.array([loss for row in losses for loss in row], dtype=np.float64)
    size = np.array([count for row in bits for count in row], dtype=np.float64)
    # In units of the whole, so that the solver's absolute tolerances mean the same for every model.
    result = milp(
        cost / max(float(cost.max()), 1e-300),
        constraints=[LinearConstraint(choose, 1, 1), LinearConstraint(size[None] / available, -np.inf, 1)],
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    chosen = [index for index, value in enumerate(result.x) if value > 0.5]
    starts = np.cumsum([0, *(len(row) for row in losses)])
    picked = [index - int(starts[group]) for group, index in enumerate(chosen)]
    while sum(row[at] for row, at in zip(bits, picked, strict=True)) > available:
        _shrink(picked, losses, bits)
    return picked


def _shrink(picked: list[int], losses: Sequence[Sequence[float]], bits: Sequence[Sequence[int]]) -> None:
    """Undo what the solver's tolerance let over the limit: the step down that costs least a bit."""
    steps = [
        ((losses[group][other] - losses[group][now]) / (bits[group][now] - bits[group][other]), group, other)
        for group, now in enumerate(picked)
        for other in range(len(bits[group]))
        if bits[group][other] < bits[group][now]
    ]
    _, group, other = min(steps)
    picked[group] = other
