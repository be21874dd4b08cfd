"""GPTQ: round one matrix so that its output on the calibration inputs changes as little as possible.

The objective is tr((W - Q) H (W - Q)^T), with H the mean of x x^T over the inputs x that the matrix reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.quantization.factor import Factor, factorize
from glmexport.quantization.grid import decode, encode, minmax_grid, searched_grid
from glmexport.quantization.linear import QuantizedLinear
from glmexport.quantization.order import ColumnOrder, column_order
from glmexport.quantization.polish import polish
from glmexport.recipe import Format, Solver


@dataclass(frozen=True)
class Solution:
    """A quantized matrix and how it was found.

    Errors are tr(E H E^T) / tr(W H W^T) on the calibration inputs, without the damping.
    """

    linear: QuantizedLinear
    relative_error: float
    round_to_nearest_error: float
    damping: float
    dead_columns: int
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
    """What the linears of one tap have in common: the order of its columns and its factored Hessian."""

    order: ColumnOrder
    factor: Factor | None

    @classmethod
    def of(cls, hessian: Tensor, form: Format, solver: Solver, *, consume: bool = False) -> Problem:
        """Order and factor ``hessian`` [K, K] fp32, the mean of x x^T; with ``consume`` its storage is reused."""
        order = column_order(hessian.diagonal(), form.group_size, solver.order)
        return cls(order, factorize(hessian, order, solver.damping, consume=consume))


def gptq(chunks: Iterable[Tensor], problem: Problem, form: Format, solver: Solver) -> Solution:
    """Quantize a matrix, given as ``chunks`` [rows, K] fp32 of its rows; rows do not depend on one another.

    Where the Hessian cannot be factored at any damping, the result is rounded to nearest and says so.
    """
    factor = problem.factor
    if factor is None:
        nearest = QuantizedLinear.concatenate([round_to_nearest(chunk, form) for chunk in chunks])
        reason = "the Hessian could not be factored: rounded to nearest"
        return Solution(nearest, math.nan, math.nan, math.nan, 0, reason)
    parts = []
    error = nearest_error = norm = 0.0
    for chunk in chunks:
        sweep = _start(chunk, problem.order)
        _sweep(sweep, factor, problem.order, form, solver)
        projected = _project(factor, sweep.error)
        polish(sweep, factor, problem.order, form, rounds=solver.polish_rounds, projected=projected)
        error += _quadratic(factor, sweep.error, projected)
        norm += _quadratic(factor, sweep.weights, _project(factor, sweep.weights))
        nearest_rows = (chunk - round_to_nearest(chunk, form).dequantize()).T[problem.order.columns]
        nearest_error += _quadratic(factor, nearest_rows, _project(factor, nearest_rows))
        parts.append(_stored(sweep, problem.order, form))
    norm = max(norm, 1e-30)
    raised = factor.damping > solver.damping * 1.001
    return Solution(
        linear=QuantizedLinear.concatenate(parts),
        relative_error=error / norm,
        round_to_nearest_error=nearest_error / norm,
        damping=factor.damping,
        dead_columns=factor.dead_columns,
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
