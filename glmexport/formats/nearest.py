"""Round to nearest: the result for a matrix without a Hessian, and the one that the solver may never be worse than."""

from __future__ import annotations

import torch
from torch import Tensor

from glmexport.formats.codecs import codec_of
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format


def round_to_nearest(weight: Tensor, form: Format, importance: Tensor | None = None) -> QuantizedLinear:
    """Return ``weight`` with every number at its nearest code, on min-max grids or on searched ones.

    Args:
        weight: [N, K] fp32.
        form: how to store it.
        importance: [K], weight of the squared error in each column, by which grids are searched; None: min-max.
    """
    codec = codec_of(form)
    rows, size = weight.shape
    groups = -(-size // form.group_size)
    codes = weight.new_empty(rows, size, dtype=torch.uint8)
    scales, zero_points = weight.new_empty(rows, groups), weight.new_empty(rows, groups)
    for group in range(groups):
        span = slice(group * form.group_size, min((group + 1) * form.group_size, size))
        columns = weight[:, span].T.contiguous()
        grid = codec.fit(columns, None if importance is None else importance[span])
        scales[:, group], zero_points[:, group] = grid.scale, grid.zero_point
        codes[:, span] = grid.encode(columns).T
    return QuantizedLinear.from_numbers(form, codec.numbers(codes, scales, zero_points))


def nearest_without_text(weight: Tensor, form: Format, *, searched: bool) -> QuantizedLinear:
    """Return ``weight`` [N, K] rounded to nearest where every column counts the same.

    ``searched`` asks for the search, which is done where the format gains by it.
    """
    importance = weight.new_ones(weight.shape[1]) if searched and codec_of(form).searched else None
    return round_to_nearest(weight, form, importance)
