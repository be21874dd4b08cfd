"""GPTQ: round one matrix so that its output on the calibration inputs is as near its goal as possible.

The objective is tr((G - Q) H (G - Q)^T), with H the mean of x x^T over the inputs x that the matrix reads, and G the
matrix W itself or, with an asymmetric target, what takes the output back to the original's (see ``goal``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.quantization.factor import Factor, factorize
from glmexport.quantization.goal import Goal, Sample, shrinkage
from glmexport.quantization.grid import decode, encode, minmax_grid, searched_grid
from glmexport.quantization.linear import QuantizedLinear
from glmexport.quantization.order import ColumnOrder, column_order
from glmexport.quantization.polish import polish
from glmexport.recipe import Format, Solver


@dataclass(frozen=True)
class Solution:
    """A quantized matrix and how it was found.

    Errors are tr(E H E^T) / tr(G H G^T) on the calibration inputs, without the damping.
    """

    linear: QuantizedLinear
    relative_error: float
    round_to_nearest_error: float
    damping: float
    dead_columns: int
    #: Mean over the rows of what held-out text left of the asymmetric target's correction; None without one.
    shrinkage: float | None = None
    #: Rows whose polish made held-out text worse and was taken back.
    unpolished_rows: int = 0
    #: Why the solver could not do what the recipe asks for; None if it did.
    fallback: str | None = None


@dataclass
class Sweep:
    """A matrix under way, inputs along the first axis and in sweep order: [K, N]; per group [G, N]."""

    weights: Tensor
    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    #: W - Q.
    error: Tensor


def round_to_nearest(weight: Tensor, form: Format, importance: Tensor | None = None) -> QuantizedLinear:
    """Every weight to its nearest code. Min-max grids, or searched ones if ``importance`` [K] is given.

    Args:
        weight: [N, K] fp32.
        form: how to store it.
        importance: weight of the squared error in each column.
    """
    rows, size = weight.shape
    groups = -(-size // form.group_size)
    codes = torch.empty(rows, size, dtype=torch.uint8)
    scales = torch.empty(rows, groups)
    zero_points = torch.empty(rows, groups)
    for group in range(groups):
        span = slice(group * form.group_size, min((group + 1) * form.group_size, size))
        columns = weight[:, span].T.contiguous()
        grid = minmax_grid(columns, form) if importance is None else searched_grid(columns, importance[span], form)
        scales[:, group], zero_points[:, group] = grid
        codes[:, span] = encode(columns, *grid, form.bits).T.to(torch.uint8)
    return _quantized(form, codes, scales, zero_points)


@dataclass(frozen=True)
class Problem:
    """What the linears of one tap have in common.

    The order of its columns, its factored Hessian, and held-out text whose columns are in sweep order.
    """

    order: ColumnOrder
    factor: Factor | None
    sample: Sample | None = None

    @classmethod
    def of(
        cls, hessian: Tensor, form: Format, solver: Solver, sample: Sample | None = None, *, consume: bool = False
    ) -> Problem:
        """Order and factor ``hessian`` [K, K] fp32, the mean of x x^T; with ``consume`` its storage is reused."""
        order = column_order(hessian.diagonal(), form.group_size, solver.order)
        if sample is not None:
            sample = Sample(sample.inputs[:, order.columns], sample.weights)
        return cls(order, factorize(hessian, order, solver.damping, consume=consume), sample)


def gptq(
    chunks: Iterable[Tensor], problem: Problem, form: Format, solver: Solver, goal: Goal | None = None
) -> Solution:
    """Quantize a matrix, given as ``chunks`` [rows, K] fp32 of its rows; rows do not depend on one another.

    A ``goal`` needs a problem with held-out text. Where the Hessian cannot be factored at any damping, the result is
    rounded to nearest and says so.
    """
    factor, order, sample = problem.factor, problem.order, problem.sample
    if factor is None:
        nearest = QuantizedLinear.concatenate([round_to_nearest(chunk, form) for chunk in chunks])
        reason = "the Hessian could not be factored: rounded to nearest"
        return Solution(nearest, math.nan, math.nan, math.nan, 0, fallback=reason)
    parts = []
    error = nearest_error = norm = kept = 0.0
    start = unpolished = 0
    for chunk in chunks:
        sweep = _start(chunk, order)
        missed: Tensor | None = None
        if goal is not None and sample is not None:
            factors, missed = _aim(sweep, factor, order, sample, *goal.rows(chunk, start))
            kept += float(factors.sum())
        _sweep(sweep, factor, order, form, solver)
        projected = _project(factor, sweep.error)
        unpolished += _polish(sweep, problem, factor, form, solver.polish_rounds, projected, missed)
        error += _quadratic(factor, sweep.error, projected)
        norm += _quadratic(factor, sweep.weights, _project(factor, sweep.weights))
        nearest_rows = sweep.weights - round_to_nearest(chunk, form).dequantize().T[order.columns]
        nearest_error += _quadratic(factor, nearest_rows, _project(factor, nearest_rows))
        parts.append(_stored(sweep, order, form))
        start += chunk.shape[0]
    norm = max(norm, 1e-30)
    raised = factor.damping > solver.damping * 1.001
    return Solution(
        linear=QuantizedLinear.concatenate(parts),
        relative_error=error / norm,
        round_to_nearest_error=nearest_error / norm,
        damping=factor.damping,
        dead_columns=factor.dead_columns,
        shrinkage=kept / start if goal is not None else None,
        unpolished_rows=unpolished,
        fallback=f"the Hessian needed damping {factor.damping:g} instead of {solver.damping:g}" if raised else None,
    )


def _start(weight: Tensor, order: ColumnOrder) -> Sweep:
    weights = weight.T[order.columns].contiguous()
    size, rows = weights.shape
    groups = len(order.bounds)
    return Sweep(
        weights,
        torch.empty(size, rows, dtype=torch.uint8),
        torch.empty(groups, rows),
        torch.empty(groups, rows),
        torch.empty_like(weights),
    )


def _aim(
    sweep: Sweep, factor: Factor, order: ColumnOrder, sample: Sample, cross: Tensor, difference: Tensor
) -> tuple[Tensor, Tensor]:
    """Move the weights [K, N] from the matrix to its goal.

    Args:
        sweep: its weights are changed in place.
        factor: of H.
        order: of the sweep.
        sample: held-out text.
        cross: C [N, K], in stored order.
        difference: d [S, N], what held-out text should find at the output beyond what the matrix gives it.

    Returns:
        The shrinkage of every row [N], and what is left of ``difference`` [S, N].
    """
    correction = torch.cholesky_solve(cross.T[order.columns].flip(0), factor.lower).flip(0)
    predicted = sample.inputs @ correction
    factors = shrinkage(difference, predicted, sample.weights)
    sweep.weights += correction.mul_(factors)
    return factors, difference - predicted.mul_(factors)


def _polish(
    sweep: Sweep,
    problem: Problem,
    factor: Factor,
    form: Format,
    rounds: int,
    projected: Tensor,
    missed: Tensor | None,
) -> int:
    """Polish, and take back the rows that it makes worse on held-out text; how many.

    ``missed`` [S, N] is the error that G itself leaves on that text; none where G is the matrix.
    """
    sample = problem.sample
    if not rounds:
        return 0
    if sample is None:
        polish(sweep, factor, problem.order, form, rounds=rounds, projected=projected)
        return 0

    def held_out() -> Tensor:
        outputs = sample.inputs @ sweep.error
        return sample.errors(outputs if missed is None else outputs.add_(missed))

    before, fields = held_out(), (sweep.codes, sweep.scales, sweep.error, projected)
    copies = [field.clone() for field in fields]
    polish(sweep, factor, problem.order, form, rounds=rounds, projected=projected)
    worse = held_out() > before
    for field, copy in zip(fields, copies, strict=True):
        torch.where(worse, copy, field, out=field)
    return int(worse.sum())


def _sweep(sweep: Sweep, factor: Factor, order: ColumnOrder, form: Format, solver: Solver) -> None:
    """Round column after column; each sees the error of those before it. Fills codes, grids and error.

    The grid of a group is fitted when the sweep enters it, on weights that carry the compensation they will be
    rounded with; grids fitted beforehand would cover weights that no longer exist.
    """
    for group, (start, stop) in enumerate(order.bounds):
        upper, conditional = factor.columns(start, stop)
        incoming = upper[:start].T @ sweep.error[:start]
        compensated = sweep.weights[start:stop] + incoming
        # Moving a column moves the later ones of its group too, rounded or not: solved for all of them at once.
        entering = sweep.weights[start:stop] + torch.linalg.solve_triangular(
            upper[start:stop].T, incoming, upper=False, unitriangular=True
        )
        if solver.scale_search:
            scale, zero_point = searched_grid(entering, conditional, form)
        else:
            scale, zero_point = minmax_grid(entering, form)
        error = sweep.error[start:stop]
        for column in range(stop - start):
            goal = compensated[column]
            if column:
                goal = goal + upper[start : start + column, column] @ error[:column]
            code = encode(goal, scale, zero_point, form.bits)
            sweep.codes[start + column] = code.to(torch.uint8)
            torch.sub(sweep.weights[start + column], decode(code, scale, zero_point), out=error[column])
        sweep.scales[group], sweep.zero_points[group] = scale, zero_point


def _stored(sweep: Sweep, order: ColumnOrder, form: Format) -> QuantizedLinear:
    """Back to the checkpoint's column order."""
    size, rows = sweep.weights.shape
    codes = torch.empty(rows, size, dtype=torch.uint8)
    codes[:, order.columns] = sweep.codes.T
    groups = torch.tensor(order.groups)
    scales, zero_points = torch.empty(rows, len(groups)), torch.empty(rows, len(groups))
    scales[:, groups] = sweep.scales.T
    zero_points[:, groups] = sweep.zero_points.T
    return _quantized(form, codes, scales, zero_points)


def _quantized(form: Format, codes: Tensor, scales: Tensor, zero_points: Tensor) -> QuantizedLinear:
    return QuantizedLinear(form, codes, scales.half(), None if form.symmetric else zero_points.to(torch.uint8))


def _project(factor: Factor, columns: Tensor) -> Tensor:
    """H @ ``columns`` [K, N], H in sweep order."""
    return (factor.hessian @ columns.flip(0)).flip(0)


def _quadratic(factor: Factor, columns: Tensor, projected: Tensor) -> float:
    """tr(C^T H C) of the Hessian as measured: without damping and without the fill of dead columns."""
    whole = torch.sum(columns * projected, dtype=torch.float64)
    added = torch.sum(factor.added[:, None] * columns.square(), dtype=torch.float64)
    return max(float(whole - added), 0.0)
