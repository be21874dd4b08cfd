"""Loops at the end of a text: against every period tried one by one."""

from __future__ import annotations

from itertools import cycle, islice

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glmexport.validation.behaviour.loops import LEAST_REPEATS, LEAST_TOKENS, LONGEST_PERIOD, Loop, find_loop


def naive(tokens: list[int]) -> Loop | None:
    for period in range(1, LONGEST_PERIOD + 1):
        start = len(tokens) - period
        while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        length = len(tokens) - start
        if length >= LEAST_TOKENS and length >= LEAST_REPEATS * period:
            return Loop(period, length // period, start)
    return None


@st.composite
def looping(draw: st.DrawFn) -> list[int]:
    head = draw(st.lists(st.integers(0, 2), max_size=30))
    block = draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))
    return head + list(islice(cycle(block), draw(st.integers(0, 80))))


@given(looping())
@example([])
@example([1] * 24)
@example([1] * 23)
def test_as_every_period_tried_one_by_one(tokens: list[int]) -> None:
    assert find_loop(tokens) == naive(tokens)


@pytest.mark.parametrize("period", [1, 5, 6, 7, 63, 64])
def test_the_least_that_is_a_loop(period: int) -> None:
    needed = max(LEAST_TOKENS, LEAST_REPEATS * period)
    tokens = [-1, *(index % period for index in range(needed))]
    assert find_loop(tokens) == Loop(period, needed // period, 1)
    assert find_loop(tokens[:-1]) is None


def test_longer_periods_are_not_looked_for() -> None:
    assert find_loop(list(range(65)) * 8) is None


def test_a_loop_that_was_left_again_is_none() -> None:
    assert find_loop([1, 2] * 50 + [3]) is None


def test_a_loop_may_be_cut_within_its_block() -> None:
    assert find_loop([9, 9, *[1, 2, 3] * 10, 1]) == Loop(3, 10, 2)
