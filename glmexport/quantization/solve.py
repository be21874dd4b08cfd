"""GPTQ: round one matrix so that its output on the calibration inputs is as near its goal as possible.

The objective is tr((G - Q) H (G - Q)^T), with H the mean of x x^T over the inputs x that the matrix reads, and G the
matrix W itself or, with an asymmetric target, the one whose output is the original's (see ``goal``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
from glmexport.quantization.ranks import Parcel

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
    the rows (``told_stride``). That of round-to-nearest is with the recipe's search for scales, weighted by the mean
    square of each column's input: the best that can be done without compensation, and a harder comparison than plain
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


@dataclass(frozen=True)
class RowBlock:
    """Some rows of a matrix, quantized, and what they add to the figures of its ``Solution``."""

    linear: QuantizedLinear
    #: The sums of tr(G H G^T) and of both errors, as in ``Solution``, and that of the rows' shrinkage.
    norm: float = 0.0
    error: float = 0.0
    nearest_error: float = 0.0
    kept: float = 0.0
    unpolished_rows: int = 0
    nearest_rows: int = 0

    def parcel(self) -> Parcel:
        """Return what other ranks are sent of it."""
        numbers = (self.linear.codes, self.linear.scales, self.linear.zero_points)
        figures = [self.norm, self.error, self.nearest_error, self.kept, self.unpolished_rows, self.nearest_rows]
        return Parcel(numbers, figures)

    @classmethod
    def received(cls, form: Format, parcel: Parcel) -> RowBlock:
        """Return the block of that ``parcel``, whose rows are in the format ``form``."""
        codes, scales, zero_points = parcel.tensors
        assert codes is not None and scales is not None
        return cls(QuantizedLinear(form, codes, scales, zero_points), *parcel.facts)


def gptq(
    chunks: Iterable[Tensor], problem: Problem, form: Format, solver: Solver, goal: Correction | None = None
) -> Solution:
    """Quantize a matrix, given as ``chunks`` [rows, K] fp32 of its rows; rows do not depend on one another.

    No row ends worse than rounded to nearest, as far as held-out text can tell: where that costs less
    (``Problem.surely_less``), it is what the row gets. A ``goal`` is that of the ``problem`` (``Problem.correction``).
    Where the Hessian cannot be factored or rests on next to no text, the whole matrix is rounded to nearest, and the
    solution says so.
    """
    blocks, start = [], 0
    for chunk in chunks:
        blocks.append(solve_rows(chunk, start, problem, form, solver, goal))
        start += len(chunk)
    return join_rows(blocks, problem, solver, goal)


def solve_rows(
    chunk: Tensor, start: int, problem: Problem, form: Format, solver: Solver, goal: Correction | None
) -> RowBlock:
    """Quantize ``chunk`` [rows, K] fp32, the rows of a matrix from ``start`` on; otherwise as ``gptq``."""
    factor, order, codec = problem.factor, problem.order, codec_of(form)
    importance = problem.importance if solver.scale_search else None
    if factor is None:
        return RowBlock(round_to_nearest(chunk, form, importance), nearest_rows=len(chunk))
    sweep = start_sweep(chunk, order)
    missed: Tensor | None = None
    kept, unpolished = 0.0, 0
    if goal is not None:
        factors, missed = _aim(sweep, goal, chunk, start)
        kept = float(factors.sum())
    swept = round_columns(sweep, factor, order, codec, solver)
    cost = problem.cost(sweep.error, swept, missed)
    if solver.polish_rounds:
        unpolished, cost = _polish(sweep, problem, factor, codec, solver.polish_rounds, cost, missed)
    nearest = round_to_nearest(chunk, form, importance)
    rounded = sweep.weights - nearest.dequantize().T[order.columns]
    better = _cheaper(problem, factor, rounded, sweep.error, cost, missed)
    stride = told_stride(len(order.columns))
    told = slice(-start % stride, None, stride)
    taken, left = better[told], rounded[:, told]
    return RowBlock(
        linear=_stored(sweep, order, codec).with_rows(better, nearest),
        norm=_total(_quadratic(factor, sweep.weights[:, told])),
        error=_total(_quadratic(factor, torch.where(taken, left, sweep.error[:, told]))),
        nearest_error=_total(_quadratic(factor, left)),
        kept=kept,
        unpolished_rows=unpolished,
        nearest_rows=int(better.sum()),
    )


def join_rows(blocks: Sequence[RowBlock], problem: Problem, solver: Solver, goal: Correction | None) -> Solution:
    """Return the matrix of all ``blocks`` of its rows, in order, and how it was found."""
    linear = QuantizedLinear.concatenate([block.linear for block in blocks])
    rows, factor = len(linear.codes), problem.factor
    if factor is None:
        return Solution(linear, math.nan, math.nan, math.nan, 0, nearest_rows=rows, fallback=problem.refusal)
    norm = max(sum(block.norm for block in blocks), 1e-30)
    raised = factor.damping > solver.damping * 1.001
    return Solution(
        linear=linear,
        relative_error=sum(block.error for block in blocks) / norm,
        round_to_nearest_error=sum(block.nearest_error for block in blocks) / norm,
        damping=factor.damping,
        dead_columns=factor.dead_columns,
        double=factor.double,
        shrinkage=sum(block.kept for block in blocks) / rows if goal is not None else None,
        unpolished_rows=sum(block.unpolished_rows for block in blocks),
        nearest_rows=sum(block.nearest_rows for block in blocks),
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


def told_stride(size: int) -> int:
    """Return the stride of the rows whose errors are computed: each one takes time by the square of its ``size``."""
    return max(1, size // _TOLD_SIZE)


def _quadratic(factor: Factor, columns: Tensor) -> Tensor:
    """Return c^T H c [N] fp64 of each of the ``columns`` [K, N], H as measured: without damping and fill."""
    whole = torch.sum(columns * _project(factor, columns), 0, dtype=torch.float64)
    return whole - torch.sum(factor.added[:, None] * columns.square(), 0, dtype=torch.float64)


def _total(quadratics: Tensor) -> float:
    """Return the sum of ``quadratics``; those below 0 come from rounding."""
    return max(float(quadratics.sum()), 0.0)
