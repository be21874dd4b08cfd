"""GPTQ: round one matrix so that its output on the calibration inputs is as near its goal as possible.

The objective is tr((G - Q) H (G - Q)^T), with H the mean of x x^T over the inputs x that the matrix reads, and G the
matrix W itself or, with an asymmetric target, the one whose output is the original's (see ``goal``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.formats.codec import Codec
from glmexport.formats.codecs import codec_of
from glmexport.formats.nearest import round_to_nearest
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format, Solver
from glmexport.quantization.factor import Factor
from glmexport.quantization.goal import Correction, shrinkage
from glmexport.quantization.order import ColumnOrder, strips
from glmexport.quantization.polish import polish
from glmexport.quantization.problem import Problem

#: Half of the largest width at which the errors of all rows are computed.
_TOLD_SIZE = 512
#: Largest relative difference between two ways of adding up the same cost.
_ROUNDING = 1e-4
#: Number of columns whose part of a cost is computed together.
_STEPS = 256


@dataclass(frozen=True)
class Solution:
    """A quantized matrix, and how it was found.

    Errors are tr(E H E^T) / tr(G H G^T) on the calibration inputs, without the damping; of wide matrices over some of
    the rows (``_stride``). That of round-to-nearest is with the recipe's search for scales, weighted by the mean square
    of each column's input: the best that can be done without compensation, and a harder comparison than plain
    round-to-nearest.
    """

    linear: QuantizedLinear
    relative_error: float
    round_to_nearest_error: float
    damping: float
    dead_columns: int
    #: Whether the Hessian had to be factored in fp64.
    double: bool = False
    #: Mean share over the rows of the asymmetric target's correction that held-out text confirmed; None without one.
    shrinkage: float | None = None
    #: Number of rows whose polish made held-out text worse and was taken back.
    unpolished_rows: int = 0
    #: Number of rows that are rounded to nearest because that serves them better; all of them after such a fallback.
    nearest_rows: int = 0
    #: The reason why the solver could not do what the recipe asks for; None if it did.
    fallback: str | None = None


@dataclass
class Sweep:
    """A matrix under way, inputs along the first axis and in sweep order: [K, N]; per group [G, N]."""

    weights: Tensor
    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    #: The error W - Q.
    error: Tensor


def gptq(
    chunks: Iterable[Tensor], problem: Problem, form: Format, solver: Solver, goal: Correction | None = None
) -> Solution:
    """Quantize a matrix, given as ``chunks`` [rows, K] fp32 of its rows; rows do not depend on one another.

    No row ends worse than rounded to nearest, as far as held-out text can tell: where that costs less
    (``Problem.surely_less``), it is what the row gets. A ``goal`` is that of the ``problem`` (``Problem.correction``).
    Where the Hessian cannot be factored or rests on next to no text, the whole matrix is rounded to nearest, and the
    solution says so.
    """
    factor, order, codec = problem.factor, problem.order, codec_of(form)
    importance = problem.importance if solver.scale_search else None
    if factor is None:
        nearest = QuantizedLinear.concatenate([round_to_nearest(chunk, form, importance) for chunk in chunks])
        rows = nearest.codes.shape[0]
        return Solution(nearest, math.nan, math.nan, math.nan, 0, nearest_rows=rows, fallback=problem.refusal)
    parts = []
    error = nearest_error = norm = kept = 0.0
    start = unpolished = replaced = 0
    stride = _stride(len(order.columns))
    for chunk in chunks:
        sweep = start_sweep(chunk, order)
        missed: Tensor | None = None
        if goal is not None:
            factors, missed = _aim(sweep, goal, chunk, start)
            kept += float(factors.sum())
        swept = round_columns(sweep, factor, order, codec, solver)
        cost = problem.cost(sweep.error, swept, missed)
        if solver.polish_rounds:
            taken_back, cost = _polish(sweep, problem, factor, codec, solver.polish_rounds, cost, missed)
            unpolished += taken_back
        nearest = round_to_nearest(chunk, form, importance)
        rounded = sweep.weights - nearest.dequantize().T[order.columns]
        better = _cheaper(problem, factor, rounded, sweep.error, cost, missed)
        replaced += int(better.sum())
        told = slice(-start % stride, None, stride)
        taken, left = better[told], rounded[:, told]
        norm += _total(_quadratic(factor, sweep.weights[:, told]))
        nearest_error += _total(_quadratic(factor, left))
        error += _total(_quadratic(factor, torch.where(taken, left, sweep.error[:, told])))
        parts.append(_stored(sweep, order, codec).with_rows(better, nearest))
        start += chunk.shape[0]
    norm = max(norm, 1e-30)
    raised = factor.damping > solver.damping * 1.001
    return Solution(
        linear=QuantizedLinear.concatenate(parts),
        relative_error=error / norm,
        round_to_nearest_error=nearest_error / norm,
        damping=factor.damping,
        dead_columns=factor.dead_columns,
        double=factor.double,
        shrinkage=kept / start if goal is not None else None,
        unpolished_rows=unpolished,
        nearest_rows=replaced,
        fallback=f"the Hessian needed damping {factor.damping:g} instead of {solver.damping:g}" if raised else None,
    )


def start_sweep(weight: Tensor, order: ColumnOrder) -> Sweep:
    """Return a matrix [N, K] in sweep order, of which nothing is rounded yet."""
    weights = weight.T[order.columns].contiguous()
    size, rows = weights.shape
    groups = len(order.bounds)
    return Sweep(
        weights,
        weights.new_empty(size, rows, dtype=torch.uint8),
        weights.new_empty(groups, rows),
        weights.new_empty(groups, rows),
        torch.empty_like(weights),
    )


def _aim(sweep: Sweep, goal: Correction, weight: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Move the weights [K, N] of ``sweep`` from the rows ``weight`` [N, K] of the matrix to their goal, in place.

    Returns:
        The shrinkage of every row [N], and what held-out text still misses at the output [S, N].
    """
    correction, predicted, difference = goal.rows(weight, start)
    factors = shrinkage(difference, predicted, goal.sample.weights)
    sweep.weights += correction.mul_(factors)
    return factors, difference - predicted.mul_(factors)


def _polish(
    sweep: Sweep,
    problem: Problem,
    factor: Factor,
    codec: Codec,
    rounds: int,
    before: Tensor,
    missed: Tensor | None,
) -> tuple[int, Tensor]:
    """Polish, and take back the rows that it makes worse on held-out text.

    ``before`` [N] is what every row costs, ``missed`` as for ``Problem.cost``.

    Returns:
        How many rows were taken back, and what every row costs now, [N].
    """
    if problem.sample is None:
        # Without held-out text the cost is what polishing lowers: no row can get worse.
        polish(sweep, factor, problem.order, codec, rounds=rounds)
        return 0, (sweep.error * _project(factor, sweep.error)).sum(0)
    fields = (sweep.codes, sweep.scales, sweep.error)
    copies = [field.clone() for field in fields]
    polish(sweep, factor, problem.order, codec, rounds=rounds)
    after = problem.cost(sweep.error, None, missed)
    worse = after > before
    for field, copy in zip(fields, copies, strict=True):
        torch.where(worse, copy, field, out=field)
    return int(worse.sum()), torch.minimum(before, after)


def _cheaper(
    problem: Problem, factor: Factor, error: Tensor, other: Tensor, than: Tensor, missed: Tensor | None
) -> Tensor:
    """Return the rows [N] bool that ``error`` [K, N] costs less than ``other``, which costs ``than`` [N]."""
    if problem.sample is None:
        # The two are added up differently: where they are the same but for rounding, nothing changes.
        return ~reaches(factor, error, than * (1 - _ROUNDING))
    return problem.surely_less(problem.cost(error, None, missed), than, error, other, missed)


def reaches(factor: Factor, columns: Tensor, limit: Tensor) -> Tensor:
    """Return which of the ``columns`` c [K, N] have c^T H c >= ``limit`` [N], H damped.

    The sum over the steps of the sweep only grows, and the first steps are the shortest and weigh most: most columns
    are decided long before the last one, and are left out of the steps after it.
    """
    backwards, total = columns.flip(0), torch.zeros_like(limit)
    undecided = torch.arange(len(limit), device=limit.device)
    reached = torch.zeros_like(limit, dtype=torch.bool)
    for stop in range(len(backwards), 0, -_STEPS):
        start = max(0, stop - _STEPS)
        terms = factor.lower[start:, start:stop].T @ backwards[start:]
        total += terms.square_().sum(0)
        over = total >= limit[undecided]
        reached[undecided[over]] = True
        if 2 * int(over.sum()) >= len(undecided) or stop == len(backwards):
            undecided, total, backwards = undecided[~over], total[~over], backwards[:, ~over]
        if not len(undecided):
            break
    return reached


def round_columns(sweep: Sweep, factor: Factor, order: ColumnOrder, codec: Codec, solver: Solver) -> Tensor:
    """Round column after column; each sees the error of those before it. Fills codes, grids and error.

    The result is e^T H e [N] of every row's error, H damped: the sum of what each column's rounding still costs.

    The grid of a group is fitted when the sweep enters it, on weights that carry the compensation they will be
    rounded with; grids fitted beforehand would cover weights that no longer exist.
    """
    cost = sweep.weights.new_zeros(sweep.weights.shape[1])
    for group, (start, stop) in enumerate(order.bounds):
        upper, conditional = factor.columns(start, stop)
        incoming = upper[:start].T @ sweep.error[:start]
        compensated = sweep.weights[start:stop] + incoming
        # Moving a column moves the later ones of its group too, rounded or not: solved for all of them at once.
        entering = sweep.weights[start:stop] + torch.linalg.solve_triangular(
            upper[start:stop].T, incoming, upper=False, unitriangular=True
        )
        grid = codec.fit(entering, conditional if solver.scale_search else None)
        error, levels = sweep.error[start:stop], torch.empty_like(compensated)
        scale, inverse = grid.scale, 1 / grid.scale
        price = conditional.tolist()
        for first, last in strips(stop - start):
            for column in range(first, last):
                goal = compensated[column]
                level = grid.nearest_(torch.mul(goal, inverse, out=levels[column]))
                left = torch.addcmul(goal, level, scale, value=-1)
                cost.addcmul_(left, left, value=price[column])
                weight = sweep.weights[start + column]
                torch.addcmul(weight, level, scale, value=-1, out=error[column])
                # An outer product: libraries of matrix products take several times as long for such narrow ones.
                compensated[column + 1 : last].addr_(upper[start + column, column + 1 : last], error[column])
            compensated[last:].addmm_(upper[start + first : start + last, last:].T, error[first:last])
        sweep.codes[start:stop] = grid.codes(levels)
        sweep.scales[group], sweep.zero_points[group] = scale, grid.zero_point
    return cost


def _stored(sweep: Sweep, order: ColumnOrder, codec: Codec) -> QuantizedLinear:
    """Return the matrix in the checkpoint's column order."""
    size, rows = sweep.weights.shape
    codes = sweep.codes.new_empty(rows, size)
    codes[:, order.columns] = sweep.codes.T
    groups = torch.tensor(order.groups).to(codes.device)
    scales, zero_points = sweep.scales.new_empty(rows, len(groups)), sweep.scales.new_empty(rows, len(groups))
    scales[:, groups] = sweep.scales.T
    zero_points[:, groups] = sweep.zero_points.T
    return QuantizedLinear.from_numbers(codec.form, codec.numbers(codes, scales, zero_points))


def _project(factor: Factor, columns: Tensor) -> Tensor:
    """Return H @ ``columns`` [K, N], H in sweep order."""
    return (factor.hessian @ columns.flip(0)).flip(0)


def _stride(size: int) -> int:
    """Return the stride of the rows whose errors are computed: each one takes time by the square of its ``size``."""
    return max(1, size // _TOLD_SIZE)


def _quadratic(factor: Factor, columns: Tensor) -> Tensor:
    """Return c^T H c [N] fp64 of each of the ``columns`` [K, N], H as measured: without damping and fill."""
    whole = torch.sum(columns * _project(factor, columns), 0, dtype=torch.float64)
    return whole - torch.sum(factor.added[:, None] * columns.square(), 0, dtype=torch.float64)


def _total(quadratics: Tensor) -> float:
    """Return the sum of ``quadratics``; those below 0 come from rounding."""
    return max(float(quadratics.sum()), 0.0)
