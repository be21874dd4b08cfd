"""Round to nearest: what a matrix becomes without a Hessian, and what the solver may never be worse than."""

from __future__ import annotations

import torch
from torch import Tensor

from glmexport.formats.grid import encode, minmax_grid, searched_grid
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format


def round_to_nearest(weight: Tensor, form: Format, importance: Tensor | None = None) -> QuantizedLinear:
    """Every weight to its nearest code. Min-max grids, or searched ones if ``importance`` [K] is given.

    Args:
        weight: [N, K] fp32.
        form: how to store it.
        importance: weight of the squared error in each column.
    """
    rows, size = weight.shape
    groups = -(-size // form.group_size)
    codes = weight.new_empty(rows, size, dtype=torch.uint8)
    scales, zero_points = weight.new_empty(rows, groups), weight.new_empty(rows, groups)
    for group in range(groups):
        span = slice(group * form.group_size, min((group + 1) * form.group_size, size))
        columns = weight[:, span].T.contiguous()
        grid = minmax_grid(columns, form) if importance is None else searched_grid(columns, importance[span], form)
        scales[:, group], zero_points[:, group] = grid
        codes[:, span] = encode(columns, *grid, form.bits).T.to(torch.uint8)
    return stored(form, codes, scales, zero_points)


def stored(form: Format, codes: Tensor, scales: Tensor, zero_points: Tensor) -> QuantizedLinear:
    """``codes`` [N, K] uint8 with fp32 ``scales`` and ``zero_points`` [N, G], in the types they are stored in."""
    return QuantizedLinear(form, codes, scales.half(), None if form.symmetric else zero_points.to(torch.uint8))
