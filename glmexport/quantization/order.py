"""The order in which GPTQ visits columns. Groups stay whole, so the stored matrix needs no column index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Number of columns whose effect on one another is followed one by one; on later ones it is one product of matrices.
STRIP = 16


@dataclass(frozen=True)
class ColumnOrder:
    """``columns`` [K] int64: the stored column visited at each step, on the Hessian's device.

    ``bounds``: step range of every group. ``groups``: the stored index of the group that each
    range holds. All columns of a group are visited in one range, whatever the order.
    """

    columns: Tensor
    bounds: tuple[tuple[int, int], ...]
    groups: tuple[int, ...]


def column_order(diagonal: Tensor, group_size: int, order: Literal["group", "stored"]) -> ColumnOrder:
    """Return the order of the K columns of a matrix.

    ``group`` (group-aware reordering, GAR) visits groups by falling mean of the Hessian's ``diagonal``, and inside each
    group columns by falling diagonal, so that the most important weights are rounded while most columns that can
    compensate are still free. ``stored`` keeps the checkpoint's order.

    Args:
        diagonal: [K] fp32.
        group_size: weights sharing a scale; the last group may be shorter.
        order: the kind of order.
    """
    size = diagonal.shape[0]
    # These are many small sorts.
    values = diagonal.cpu()
    starts = range(0, size, group_size)
    members = [torch.arange(start, min(start + group_size, size)) for start in starts]
    indices = list(range(len(members)))
    if order == "group":
        means = torch.stack([values[columns].mean() for columns in members])
        indices = torch.argsort(means, descending=True, stable=True).tolist()
        members = [columns[torch.argsort(values[columns], descending=True, stable=True)] for columns in members]
    visited = [members[index] for index in indices]
    ends = torch.tensor([len(columns) for columns in visited]).cumsum(0).tolist()
    bounds = tuple((end - len(columns), end) for end, columns in zip(ends, visited, strict=True))
    return ColumnOrder(torch.cat(visited).to(diagonal.device), bounds, tuple(indices))


def strips(columns: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last of so many columns, a few at a time."""
    for start in range(0, columns, STRIP):
        yield start, min(start + STRIP, columns)
