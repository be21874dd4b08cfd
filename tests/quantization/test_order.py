"""The order of the sweep: a permutation that keeps groups whole."""

from __future__ import annotations

from typing import Literal

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import generator

from glmexport.quantization.order import column_order


@given(
    size=st.integers(1, 300),
    group_size=st.sampled_from([16, 32, 64, 128, 256]),
    order=st.sampled_from(["group", "stored"]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=80)
def test_every_column_once_and_groups_whole(
    size: int, group_size: int, order: Literal["group", "stored"], seed: int
) -> None:
    found = column_order(torch.rand(size, generator=generator(seed)), group_size, order)
    assert found.columns.sort().values.tolist() == list(range(size))
    assert sorted(found.groups) == list(range(-(-size // group_size)))
    end = 0
    for group, (start, stop) in zip(found.groups, found.bounds, strict=True):
        assert start == end
        end = stop
        stored = range(group * group_size, min((group + 1) * group_size, size))
        assert found.columns[start:stop].sort().values.tolist() == list(stored)
    assert end == size
    inverse = found.columns.argsort()
    assert found.columns[inverse].tolist() == list(range(size))


def test_stored_order_is_the_checkpoint_s() -> None:
    found = column_order(torch.arange(40.0), 16, "stored")
    assert found.columns.tolist() == list(range(40))
    assert found.bounds == ((0, 16), (16, 32), (32, 40))
    assert found.groups == (0, 1, 2)


def test_group_order_by_hand() -> None:
    """Groups by mean, not sum (the last one is short), then columns; equals stay in place."""
    diagonal = torch.cat([torch.full((16,), 2.0), torch.arange(16.0), torch.tensor([3.0, 9.0])])
    found = column_order(diagonal, 16, "group")
    assert found.groups == (1, 2, 0)
    assert found.bounds == ((0, 16), (16, 18), (18, 34))
    assert found.columns.tolist() == [*range(31, 15, -1), 33, 32, *range(16)]
