"""One format for every group of matrices, so that the least is lost within a number of bits, chosen by ILP."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmexport.architecture.description import Architecture, DecoderLayer
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.formats.codecs import codec_of, stored_bits
from glmexport.formats.plan import FormatPlan
from glmexport.foundation.errors import InputError
from glmexport.foundation.recipe import Budget, Format, Recipe


@dataclass(frozen=True)
class TieGroup:
    """Matrices that share a format: those of one tap (the runtime stores query, key and value as one), or one alone.

    The matrices of routed experts are one alone each: graphs hold every expert apart.
    """

    name: str
    #: None for the embedding and the lm_head.
    layer: int | None
    tap: str
    shapes: dict[str, tuple[int, int]]
    #: The formats of the budget that the runtime has kernels for here.
    candidates: tuple[Format, ...]
    #: The part that its matrices are of a routed expert (``Linear.part``); None for what every token passes.
    expert_part: str | None = None

    def bits(self, form: Format) -> int:
        """Return the stored bits of all its matrices."""
        return sum(stored_bits(shape, form) for shape in self.shapes.values())

    @property
    def tried(self) -> dict[int, tuple[int, ...]]:
        """The candidates whose loss is measured, each with those whose loss follows from it, by index.

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
#: Most groups whose formats are chosen exactly, which takes seconds; of thousands it takes minutes to hours.
_EXACT_GROUPS = 512


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
        yield from _layer_groups(layer, budget.candidates)
    head = architecture.lm_head
    if plan.form(head.weight) is not None and not architecture.tied:
        shape = (head.out_features, head.in_features)
        yield TieGroup(HEAD_TAP, None, HEAD_TAP, {head.weight: shape}, budget.candidates)


def _layer_groups(layer: DecoderLayer, candidates: tuple[Format, ...]) -> Iterator[TieGroup]:
    experts = layer.mlp.experts if isinstance(layer.mlp, MixtureOfExperts) else ()
    owners = {linear.weight: index for index, expert in enumerate(experts) for linear in expert.linears}
    for tap, linears in layer.taps.items():
        part, owner = linears[0].part, owners.get(linears[0].weight)
        shapes = {linear.weight: (linear.out_features, linear.in_features) for linear in linears}
        name = f"block {layer.index} {part}"
        if owner is None:
            yield TieGroup(name, layer.index, tap, shapes, candidates)
        else:
            yield TieGroup(f"{name} {owner}", layer.index, tap, shapes, candidates, expert_part=part)


def tried_together(groups: Sequence[TieGroup]) -> list[tuple[int, ...]]:
    """Return the indices of the groups whose loss is measured at once, in the order of the model.

    Those of all routed experts of a layer that are the same part of their expert are one; every other is alone.
    """
    together: dict[object, list[int]] = {}
    for index, group in enumerate(groups):
        key = index if group.expert_part is None else (group.layer, group.expert_part)
        together.setdefault(key, []).append(index)
    return [tuple(members) for members in together.values()]


def count_trials(architecture: Architecture, recipe: Recipe) -> int:
    """Return how many trials the recipe's budget takes."""
    groups = list(tie_groups(architecture, recipe))
    return sum(len(groups[members[0]].tried) for members in tried_together(groups))


def available_bits(architecture: Architecture, recipe: Recipe) -> int:
    """Return the bits that the budget leaves for the groups: without what stays in full precision."""
    budget = recipe.budget
    assert budget is not None
    shapes = architecture.shapes()
    quantized = {key for group in tie_groups(architecture, recipe) for key in group.shapes}
    rest = sum(stored_bits(shape, None) for key, shape in shapes.items() if key not in quantized)
    return total_bits(architecture, budget) - rest


def require_fit(architecture: Architecture, recipe: Recipe) -> None:
    """Require that some choice of formats keeps within the recipe's budget.

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
    """Return the bytes on disk of a budget's trials: all after one block and, while it is written, after the next."""
    if recipe.budget is None:
        return 0
    trials = count_trials(architecture, recipe)
    return 2 * (trials + 1) * recipe.budget.probe_tokens * architecture.hidden_size * 4


def total_bits(architecture: Architecture, budget: Budget) -> int:
    """Return the bits that the budget allows for all weights together."""
    if budget.bundle_bytes is not None:
        return 8 * (budget.bundle_bytes - architecture.rotary_bytes)
    assert budget.bits_per_weight is not None
    weights = sum(int(np.prod(shape)) for shape in architecture.shapes().values())
    return int(budget.bits_per_weight * weights)


def allowed_candidates(groups: Sequence[TieGroup], available: int) -> list[tuple[int, ...]]:
    """Return the candidates that each group may be given where ``available`` bits are left for all, by index.

    No routed expert is given fewer bits a weight than every matrix of the model could have: a probe sees little of the
    text that an expert is for, and what it does not see must not be paid for with bits that others hardly need.
    Elsewhere every candidate may be taken.
    """
    floor = 0
    for width in sorted({form.bits for group in groups for form in group.candidates}):
        # Of a group without such a format, the smallest that it has.
        wide = [[form for form in group.candidates if form.bits >= width] or group.candidates for group in groups]
        if sum(min(map(group.bits, forms)) for group, forms in zip(groups, wide, strict=True)) <= available:
            floor = width
    return [
        tuple(index for index, form in enumerate(group.candidates) if form.bits >= floor or not group.expert_part)
        or tuple(range(len(group.candidates)))
        for group in groups
    ]


def allocate(losses: Sequence[Sequence[float]], bits: Sequence[Sequence[int]], available: int) -> list[int]:
    """Return the candidate of every group that minimises the sum of losses with the sum of bits within ``available``.

    With more groups than ``_EXACT_GROUPS`` it is nearly the least (``relaxed``).

    Args:
        losses: [groups][candidates], at least 0.
        bits: [groups][candidates].
        available: the most bits in all.

    Raises:
        ValueError: even the smallest candidates need more.
    """
    if sum(min(row) for row in bits) > available:
        raise ValueError(f"no choice of candidates fits {available} bits")
    if len(losses) > _EXACT_GROUPS:
        return relaxed(losses, bits, available)
    picked = _least(losses, bits, available)
    while _sum(bits, picked) > available:
        _shrink(picked, losses, bits)
    return picked


def _least(losses: Sequence[Sequence[float]], bits: Sequence[Sequence[int]], available: int) -> list[int]:
    """Return the best choice by integer programming, within ``available`` but for the solver's tolerance."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    owner = [group for group, row in enumerate(losses) for _ in row]
    choose: NDArray[np.float64] = np.zeros((len(losses), len(owner)))
    choose[owner, np.arange(len(owner))] = 1
    cost = np.array([loss for row in losses for loss in row], dtype=np.float64)
    size = np.array([count for row in bits for count in row], dtype=np.float64)
    # Bits are shares of the whole, so that the solver's absolute tolerances mean the same for every model.
    with spared_stdout():
        result = milp(
            cost / max(float(cost.max()), 1e-300),
            constraints=[LinearConstraint(choose, 1, 1), LinearConstraint(size[None] / available, -np.inf, 1)],
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    chosen = [index for index, value in enumerate(result.x) if value > 0.5]
    starts = np.cumsum([0, *(len(row) for row in losses)])
    return [index - int(starts[group]) for group, index in enumerate(chosen)]


def relaxed(losses: Sequence[Sequence[float]], bits: Sequence[Sequence[int]], available: int) -> list[int]:
    """Return a choice within ``available`` that is off the least by at most what one step of one group is worth.

    Every group takes what costs it least at one price of a bit (Everett 1963), the lowest at which all fit. The bits
    that are left go where they spare most, step by step. Arguments as for ``allocate``, whose check was passed.
    """
    width = max(map(len, losses))
    cost = np.array([[*row, *[np.inf] * (width - len(row))] for row in losses])
    size = np.array([[*row, *[0] * (width - len(row))] for row in bits], dtype=np.float64)
    everyone = np.arange(len(losses))
    # At the highest price the smallest candidates are taken, as a bit is the least that two can differ by.
    high = float(cost[np.isfinite(cost)].max()) + 1.0
    low = 1e-30 * high
    picked = (cost + high * size).argmin(1)
    while high > low * (1 + 1e-12):
        price = float(np.sqrt(low * high))
        trial = (cost + price * size).argmin(1)
        if size[everyone, trial].sum() <= available:
            high, picked = price, trial
        else:
            low = price
    left = available - _sum(bits, picked.tolist())
    while True:
        more = size - size[everyone, picked][:, None]
        spared = cost[everyone, picked][:, None] - cost
        worth = np.where((more > 0) & (more <= left) & (spared > 0), spared / np.maximum(more, 1), 0.0)
        group, candidate = np.unravel_index(int(worth.argmax()), worth.shape)
        if worth[group, candidate] <= 0:
            return [int(index) for index in picked]
        left -= int(more[group, candidate])
        picked[group] = candidate


@contextmanager
def spared_stdout() -> Iterator[None]:
    """Keep what a library's C code prints off the standard output, which belongs to the command's document.

    HiGHS prints there from within its integer solver, whatever ``disp`` says.
    """
    if os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    flush(None)
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        # What waits in C's buffer goes where it was printed to.
        flush(None)
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _sum(bits: Sequence[Sequence[int]], picked: Sequence[int]) -> int:
    return sum(row[at] for row, at in zip(bits, picked, strict=True))


def _shrink(picked: list[int], losses: Sequence[Sequence[float]], bits: Sequence[Sequence[int]]) -> None:
    """Bring a choice that the solver's tolerance let over the limit below it: step down where a bit costs least."""
    steps = [
        ((losses[group][other] - losses[group][now]) / (bits[group][now] - bits[group][other]), group, other)
        for group, now in enumerate(picked)
        for other in range(len(bits[group]))
        if bits[group][other] < bits[group][now]
    ]
    _, group, other = min(steps)
    picked[group] = other
