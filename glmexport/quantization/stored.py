"""Matrices that a checkpoint stores quantized, taken over code by code: nothing is measured, solved or rounded."""

from __future__ import annotations

import torch

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.formats.quantized_linear import QuantizedLinear


def stored_linear(checkpoint: Checkpoint, key: str, chunk_weights: int) -> QuantizedLinear | None:
    """Return the matrix ``key`` with the codes, scales and zero points of the checkpoint; None in full precision.

    Args:
        checkpoint: the checkpoint that stores it.
        key: the name of its weight [N, K].
        chunk_weights: the number of weights that are decoded at a time.
    """
    if key not in checkpoint.quantized:
        return None
    form = checkpoint.quantized[key].exact
    rows, columns = checkpoint.shape(key)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    groups = -(-columns // form.group_size)
    scales = torch.empty(rows, groups, dtype=torch.float16)
    zero_points = torch.empty(rows, groups, dtype=torch.uint8)
    count = max(64, chunk_weights // columns)
    for start in range(0, rows, count):
        stop = min(start + count, rows)
        part = checkpoint.codes(key, start, stop)
        codes[start:stop], scales[start:stop], zero_points[start:stop] = part.codes, part.scales, part.zero_points
    return QuantizedLinear(form, codes, scales, None if form.symmetric else zero_points)
