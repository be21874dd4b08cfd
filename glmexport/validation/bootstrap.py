"""Bounds of a median of repeated measurements, and the percentiles that as many of them can tell.

The bounds are those of the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section
13.3), with rounds as the sample and both sides of a round drawn together. Percentiles are found as in MLPerf
Inference's early stopping: an order statistic that the true one is below with 99 % confidence, or none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import bdtr, betainc
from scipy.stats import bootstrap

from glmexport.results.performance import Figure, Interval

_RESAMPLES = 4999
#: Number of resamples that are in memory at a time.
_BATCH = 500
#: A fixed seed, so that the same measurements give the same bounds.
_SEED = 20261123
#: Confidence that a true percentile is below the one that is returned.
CERTAINTY = 0.99


def rounds_for_bounds(confidence: float) -> int:
    """Return the fewest rounds whose smallest and largest value bound the median with ``confidence`` each.

    All n are on one side of the true median in one case of 2^n.
    """
    return math.ceil(math.log2(1 / (1 - confidence)))


def rounds_for_percentile(q: float) -> int:
    """Return the fewest rounds whose second largest is above the ``q``-quantile (0 to 1) with 99 % confidence.

    It is the second largest, so that no single outlier is the percentile: the smallest n with P(B(n, 1 - q) <= 1)
    <= 1 %.
    """
    n = 2
    while bdtr(1, n, 1 - q) > 1 - CERTAINTY:
        n += 1
    return n


def percentile(sample: Sequence[float], q: float) -> float | None:
    """Return the smallest of ``sample`` that the true ``q``-quantile is below with 99 % confidence.

    The result is None for fewer than ``rounds_for_percentile(q)``. At least k of n are above the quantile with the
    chance P(B(n, 1 - q) >= k) = I_{1-q}(k, n - k + 1); the k-th largest of the largest such k is returned.
    """
    n = len(sample)
    if n < rounds_for_percentile(q):
        return None
    ranks = np.arange(1, n + 1)
    sure = betainc(ranks, n - ranks + 1, 1 - q) >= CERTAINTY
    return float(np.sort(np.asarray(sample, np.float64))[n - int(sure.sum())])


def figure(sample: Sequence[float], confidence: float, *, more_is_better: bool = False) -> Figure:
    """Return the median of ``sample``, its bounds, and percentiles on its bad side: high for times, low for rates."""
    lower, upper = _bounds((np.asarray(sample, np.float64),), confidence)
    sign = -1.0 if more_is_better else 1.0
    bad = [sign * value for value in sample]
    tails = (percentile(bad, q) for q in (0.90, 0.99))
    p90, p99 = (None if tail is None else sign * tail for tail in tails)
    return Figure(
        value=float(np.median(sample)), lower=lower, upper=upper, confidence=confidence, n=len(sample), p90=p90, p99=p99
    )


def ratio(numerators: Sequence[float], denominators: Sequence[float], confidence: float) -> Interval:
    """Return the ratio of the medians of paired rounds, and its bounds.

    Args:
        numerators: [n], one a round.
        denominators: [n], of the same rounds.
        confidence: the confidence of each bound by itself, 0.5 to 1.
    """
    pairs = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    lower, upper = _bounds(pairs, confidence)
    value = float(np.median(pairs[0]) / np.median(pairs[1]))
    return Interval(value=value, lower=lower, upper=upper, confidence=confidence, n=len(numerators))


def _bounds(data: tuple[np.ndarray, ...], confidence: float) -> tuple[float, float]:
    """Return the bounds of a median, or of the ratio of two, of positive quantities; too few rounds have none."""
    if len(data[0]) < rounds_for_bounds(confidence):
        return 0.0, math.inf

    def statistic(*samples: np.ndarray, axis: int) -> Any:
        medians = [np.median(sample, axis=axis) for sample in samples]
        return medians[0] if len(medians) == 1 else medians[0] / medians[1]

    interval = bootstrap(
        data,
        statistic,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        paired=len(data) > 1,
        vectorized=True,
        # Two-sided; each end by itself is then passed in 1 - confidence of samples.
        confidence_level=2 * confidence - 1,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)
