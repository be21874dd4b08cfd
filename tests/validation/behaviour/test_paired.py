"""Paired scores: against scipy, against every possible result, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, multinomial, ttest_1samp

from glmexport.validation.behaviour.paired import compare_paired, difference_bound, mcnemar


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test_of_the_changed(lost: int, gained: int) -> None:
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected)


def outcomes(tasks: int) -> list[tuple[int, int]]:
    return [(lost, gained) for lost in range(tasks + 1) for gained in range(tasks + 1 - lost)]


@pytest.mark.parametrize(("tasks", "confidence"), [(1, 0.95), (2, 0.95), (5, 0.95), (10, 0.95), (16, 0.95), (8, 0.8)])
def test_the_bound_holds_as_often_as_it_says(tasks: int, confidence: float) -> None:
    """Over all results of every pair of probabilities on a grid, the bound is not above the truth too often."""
    results = outcomes(tasks)
    limits = np.array([difference_bound(tasks, lost, gained, confidence) for lost, gained in results])
    counts = np.array([(lost, gained, tasks - lost - gained) for lost, gained in results])
    grid = [0, 0.005, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 0.98, 1]
    for lost in grid:
        for gained in (share for share in grid if lost + share <= 1):
            chances = multinomial.pmf(counts, tasks, [lost, gained, max(0, 1 - lost - gained)])
            covered = chances[limits <= gained - lost + 1e-9].sum()
            assert covered >= confidence - 1e-6, (lost, gained)


def test_the_bound_orders_results() -> None:
    """Losing one more, or gaining one less, never gives a better bound."""
    tasks = 12
    for lost, gained in outcomes(tasks):
        bound = difference_bound(tasks, lost, gained, 0.95)
        assert -1 <= bound <= (gained - lost) / tasks
        if lost:
            assert difference_bound(tasks, lost - 1, gained, 0.95) >= bound - 1e-4
            if lost + gained < tasks:
                assert difference_bound(tasks, lost - 1, gained + 1, 0.95) >= bound - 1e-4


def test_no_change_says_that_none_was_seen_in_so_many() -> None:
    """With nothing gained the bound is that of the share of lost tasks, Clopper and Pearson's."""
    for tasks in (5, 50, 500):
        exact = 1 - 0.05 ** (1 / tasks)
        assert exact <= -difference_bound(tasks, 0, 0, 0.95) <= exact * 1.05


def test_all_lost() -> None:
    result = compare_paired([1] * 10, [0] * 10)
    assert (result.lost, result.gained, result.mean_difference, result.lower_bound) == (10, 0, -1, -1)
    assert result.mcnemar_p == pytest.approx(2 / 2**10)
    # The least true loss with which ten of ten are no wonder, where everything changes: (1 + loss) / 2 are lost.
    assert -result.upper_bound == pytest.approx(2 * 0.05 ** (1 / 10) - 1, abs=0.01)


def test_by_hand() -> None:
    result = compare_paired([1, 1, 0, 1], [1, 0, 1, 0], ids=["a", "b", "c", "d"])
    assert (result.tasks, result.lost, result.gained, result.mean_difference) == (4, 2, 1, -0.25)
    # Differences 0, -1, 1, -1: variance 11 / 12 of 4.
    assert result.standard_error == pytest.approx(math.sqrt(11 / 12 / 4))
    assert result.mcnemar_p == 1
    assert result.flips == ("b", "c", "d")
    assert result.lower_bound < -0.25 < result.upper_bound


def test_scores_between_are_students() -> None:
    before, after = np.random.default_rng(0).uniform(0, 1, (2, 30))
    result = compare_paired(list(before), list(after), confidence=0.9)
    interval = ttest_1samp(after - before, 0).confidence_interval(0.8)
    assert (result.lower_bound, result.upper_bound) == pytest.approx((interval.low, interval.high))
    assert result.mcnemar_p is None


def test_scores_between_that_do_not_change() -> None:
    result = compare_paired([0.5] * 20, [0.5] * 20)
    unseen = 1 - 0.05 ** (1 / 20)
    assert (result.lower_bound, result.upper_bound) == pytest.approx((-unseen, unseen))
    assert result.flips == ()


@pytest.mark.parametrize("score", [0.5, 1.0])
def test_one_task_tells_nothing(score: float) -> None:
    result = compare_paired([score], [score])
    assert math.isinf(result.standard_error)
    assert result.lower_bound < -0.9 and result.upper_bound > 0.9


def test_no_task() -> None:
    with pytest.raises(ValueError, match="no tasks"):
        compare_paired([], [])


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([0, 0.5, 1]), st.sampled_from([0, 0.5, 1])), min_size=1, max_size=25))
def test_the_upper_bound_is_the_lower_one_of_the_other_way_round(pairs: list[tuple[float, float]]) -> None:
    before, after = (list(side) for side in zip(*pairs, strict=True))
    there, back = compare_paired(before, after), compare_paired(after, before)
    assert (there.lower_bound, there.upper_bound) == pytest.approx((-back.upper_bound, -back.lower_bound))
    assert there.lower_bound <= there.mean_difference <= there.upper_bound
    assert (there.lost, there.gained) == (back.gained, back.lost)
    assert there.flips == back.flips
