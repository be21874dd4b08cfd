"""Bounds and percentiles against the slow way to the same numbers."""

from __future__ import annotations

import math
from math import comb

import numpy as np
import pytest

from glmexport.validation import bootstrap

RNG = np.random.default_rng(7)
SAMPLE = [float(value) for value in np.exp(RNG.normal(0, 0.3, 40))]


def naive(statistic, size: int, confidence: float) -> tuple[float, float]:
    """Draw rounds with replacement, one resample at a time, with a generator of its own."""
    draws = np.random.default_rng(1)
    found = sorted(statistic(draws.integers(0, size, size)) for _ in range(4000))
    return found[round(4000 * (1 - confidence))], found[round(4000 * confidence) - 1]


def test_a_median_is_bounded_as_by_drawing_rounds_again() -> None:
    found = bootstrap.figure(SAMPLE, 0.95)
    assert found.value == np.median(SAMPLE) and found.n == 40 and found.confidence == 0.95
    low, high = naive(lambda rows: np.median([SAMPLE[row] for row in rows]), 40, 0.95)
    assert (found.lower, found.upper) == pytest.approx((low, high), rel=0.01)
    assert bootstrap.figure(SAMPLE, 0.95) == found
    wider = bootstrap.figure(SAMPLE, 0.99)
    assert wider.lower < found.lower < found.value < found.upper < wider.upper


def test_a_ratio_keeps_both_sides_of_a_round_together() -> None:
    """What slows both by the same factor does not widen the ratio at all."""
    ours, theirs = [3 * value for value in SAMPLE], SAMPLE
    found = bootstrap.ratio(ours, theirs, 0.95)
    assert (found.value, found.lower, found.upper) == pytest.approx((3, 3, 3))
    noisy = [value * (1 + 0.02 * (-1) ** index) for index, value in enumerate(ours)]
    found = bootstrap.ratio(noisy, theirs, 0.95)

    def statistic(rows):
        return np.median([noisy[row] for row in rows]) / np.median([theirs[row] for row in rows])

    assert (found.lower, found.upper) == pytest.approx(naive(statistic, 40, 0.95), rel=0.005)


def test_bounds_hold_the_true_median_as_often_as_they_say() -> None:
    low = high = 0
    draws = np.random.default_rng(3)
    for _ in range(300):
        found = bootstrap.figure([float(value) for value in np.exp(draws.normal(0, 0.5, 12))], 0.95)
        low += found.lower > 1
        high += found.upper < 1
    # 15 each are expected of 300; 26 are three standard deviations more.
    assert low <= 26 and high <= 26
    assert low + high >= 6


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_too_few_rounds_bound_nothing(confidence: float) -> None:
    least = bootstrap.rounds_for_bounds(confidence)
    # All rounds above the true median in one case of 2^n: not even the smallest would be a lower bound.
    assert 0.5**least <= 1 - confidence < 0.5 ** (least - 1)
    few, enough = bootstrap.figure(SAMPLE[: least - 1], confidence), bootstrap.figure(SAMPLE[:least], confidence)
    assert (few.lower, few.upper) == (0, math.inf)
    assert min(SAMPLE[:least]) <= enough.lower < enough.upper <= max(SAMPLE[:least])
    assert bootstrap.figure([2.5], confidence).value == 2.5


def above(n: int, q: float, k: int) -> float:
    """Chance that at least ``k`` of ``n`` are above the ``q``-quantile."""
    return sum(comb(n, i) * (1 - q) ** i * q ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize(("q", "floor"), [(0.5, 11), (0.9, 64), (0.95, 130), (0.99, 662)])
def test_the_floors_of_percentiles(q: float, floor: int) -> None:
    """Those of MLPerf Inference's early stopping, and what they are derived from."""
    assert bootstrap.rounds_for_percentile(q) == floor
    assert above(floor, q, 2) >= 0.99 > above(floor - 1, q, 2)


def test_percentiles_are_none_below_their_floors() -> None:
    sample = [float(value) for value in range(1, 662)]
    assert bootstrap.percentile(sample[:63], 0.9) is None
    assert bootstrap.percentile(sample[:64], 0.9) == 63  # the second largest
    assert bootstrap.percentile(sample, 0.99) is None
    assert bootstrap.percentile([*sample, 662.0], 0.99) == 661
    few = bootstrap.figure(sample[:63], 0.95)
    assert (few.p90, few.p99) == (None, None)


@pytest.mark.parametrize("n", [64, 100, 500])
def test_the_order_statistic_is_the_smallest_that_is_sure(n: int) -> None:
    found = bootstrap.percentile([float(value) for value in RNG.permutation(n)], 0.9)
    assert found is not None
    rank = n - int(found)  # from the top, 1 is the largest
    assert above(n, 0.9, rank) >= 0.99 > above(n, 0.9, rank + 1)


def test_the_bad_side_of_a_rate_is_the_low_one() -> None:
    rates = [float(value) for value in range(1, 65)]
    assert bootstrap.figure(rates, 0.95, more_is_better=True).p90 == 2
    assert bootstrap.figure(rates, 0.95).p90 == 63
