"""Comparison of original and bundle on the same tasks: how much the score changed, how sure that is, and which flipped.

Only tasks that are scored differently say anything about the difference, so the two are compared task by task. Of 0 and
1 that is McNemar's exact test (Psychometrika 12, 1947; exact as the binomial test of the discordant pairs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, betaincinv, stdtr, stdtrit
from scipy.stats import binom

from glmexport.results.paired import Paired

#: z of the statistic by which tables are ordered; the bound's confidence comes from their probability.
_Z = 1.645
#: Probability that the share of changed tasks is beyond those that are tried; it is taken off the risk of the bound,
#: and added to a chance, which among many has to be far smaller than that risk to count.
_INCREDIBLE, _INCREDIBLE_CHANCE = 0.001, 1e-5
#: Differences of scores that are no nearer than this are equal but for rounding.
_ROUNDING = 1e-12
#: Number of shares that are tried, and how often the interval that the bound is in is halved.
_SHARES, _HALVINGS = 64, 20


def compare_paired(
    original: Sequence[float], bundle: Sequence[float], *, ids: Sequence[str] | None = None, confidence: float = 0.95
) -> Paired:
    """Compare the scores [N] of the same tasks, 0 to 1.

    The bounds of scores that are all 0 or 1 are exact at every number of tasks; those of others are Student's t over
    tasks. Where no score changed, either says that a changed task has not been seen in N.

    Args:
        original: scores of the original.
        bundle: of the bundle, in the same order.
        ids: of the tasks; their indices, if they have none.
        confidence: of the lower bound.
    """
    if not original:
        raise ValueError("there are no tasks")
    differences = np.asarray(bundle, np.float64) - np.asarray(original, np.float64)
    tasks, mean = len(original), float(differences.mean())
    error = _standard_error(differences)
    lost, gained = int((differences < 0).sum()), int((differences > 0).sum())
    binary = all(score in (0, 1) for score in (*original, *bundle))
    names = [str(index) for index in range(tasks)] if ids is None else ids
    if binary:
        lower = difference_bound(tasks, lost, gained, confidence)
        upper = -difference_bound(tasks, gained, lost, confidence)
    else:
        # Were more than this share of the tasks different, one of so many would have been.
        unseen = -math.expm1(math.log1p(-confidence) / tasks)
        spread = (float(stdtrit(tasks - 1, confidence)) * error if error else unseen) if tasks > 1 else math.inf
        lower, upper = max(-1.0, mean - spread), min(1.0, mean + spread)
    return Paired(
        tasks=tasks,
        mean_difference=mean,
        standard_error=error,
        lost=lost,
        gained=gained,
        mcnemar_p=mcnemar(lost, gained) if binary else None,
        lower_bound=lower,
        upper_bound=upper,
        confidence=confidence,
        flips=tuple(name for name, changed in zip(names, differences != 0, strict=True) if changed),
    )


def _standard_error(differences: NDArray[np.float64]) -> float:
    if len(differences) == 1:
        return math.inf
    return 0.0 if np.ptp(differences) < _ROUNDING else float(differences.std(ddof=1) / math.sqrt(len(differences)))


def loss_chance(change: Paired, limit: float) -> float:
    """Return the chance of a mean loss as large as that of ``change`` or larger if the true one were ``limit``, 0 to 1.

    By the same means as the bounds, so that it is below 1 - confidence only where they say so too.
    """
    if change.mcnemar_p is not None:
        return _binary_chance(change.tasks, change.lost, change.gained, limit)
    distance, error = -change.mean_difference - limit, change.standard_error
    if not math.isfinite(error):
        return 1.0
    if error == 0:
        return float(1 - min(max(distance, 0.0), 1.0)) ** change.tasks
    return float(stdtr(change.tasks - 1, -distance / error))


def _binary_chance(tasks: int, lost: int, gained: int, loss: float) -> float:
    """Return the chance of results as bad or worse if P(lost) - P(gained) is ``loss``; gains are losses reversed."""
    shares = _credible(tasks, lost + gained, _INCREDIBLE_CHANCE)
    return min(1.0, _chance(tasks, _most_lost(tasks, gained, lost), loss, shares) + _INCREDIBLE_CHANCE)


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided exact p: of the binomial distribution of the smaller of the two, in all, with 1/2."""
    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))


def difference_bound(tasks: int, lost: int, gained: int, confidence: float) -> float:
    """Return a lower bound of P(gained) - P(lost), which is above the true one in at most 1 - ``confidence``.

    The smallest difference under which results at least as good as this one are not too rare, for any share of changed
    tasks that the result does not itself make incredible (Buehler, J. Amer. Statist. Assoc. 52, 1957; Berger and Boos,
    J. Amer. Statist. Assoc. 89, 1994). Score intervals such as Newcombe's are too optimistic where few tasks change and
    all are lost, of which a quantized model is suspected: of 20 tasks with a tenth lost its 95 % hold in 88 %.
    """
    most = _most_lost(tasks, lost, gained)
    shares, risk = _credible(tasks, lost + gained, _INCREDIBLE), 1 - confidence - _INCREDIBLE
    low, high = -float(shares[-1]), (gained - lost) / tasks
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _chance(tasks, most, middle, shares) > risk else (middle, high)
    return low


def _credible(tasks: int, changed: int, incredible: float) -> NDArray[np.float64]:
    """Shares of changed tasks, up to the bounds of Clopper and Pearson (Biometrika 26, 1934) for those that changed."""
    least = float(betaincinv(changed, tasks - changed + 1, incredible / 2)) if changed else 0.0
    largest = float(betaincinv(changed + 1, tasks - changed, 1 - incredible / 2)) if changed < tasks else 1.0
    return np.linspace(least, largest, _SHARES)


def _most_lost(tasks: int, lost: int, gained: int) -> NDArray[np.int64]:
    """Return, for every number of gained tasks, the most lost ones of a result at least as good; -1 for none."""
    observed = _standing(tasks, np.array([lost]), np.array([gained]))[0] - 1e-12
    gains = np.arange(tasks + 1)
    # The more are lost, the worse: halve the range in which the last one that is good enough lies.
    good, bad = np.full(tasks + 1, -1), tasks - gains + 1
    while (bad - good > 1).any():
        middle = (good + bad) // 2
        enough = _standing(tasks, np.maximum(middle, 0), gains) >= observed
        good, bad = np.where(enough, middle, good), np.where(enough, bad, middle)
    return good


def _standing(tasks: int, lost: NDArray[np.int64], gained: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what orders results: Wald's lower bound with half a task added to each cell (Agresti and Min, 2005)."""
    size, difference = tasks + 2, gained - lost
    spread: NDArray[np.float64] = np.sqrt(lost + gained + 1 - difference**2 / size)
    return (difference - _Z * spread) / size


def _chance(tasks: int, most_lost: NDArray[np.int64], difference: float, shares: NDArray[np.float64]) -> float:
    """Probability of a result within ``most_lost`` if the true difference is this, for the likeliest of ``shares``.

    Those are of tasks that change; given how many are gained, the lost are binomial among the others.
    """
    possible = np.append(shares[shares > abs(difference)], max(abs(difference), shares[0]))[:, None]
    gained = (possible + difference) / 2
    lost = np.clip((possible - gained) / np.maximum(1 - gained, 1e-300), 0, 1)
    gains = np.flatnonzero(most_lost >= 0)
    return float((binom.pmf(gains, tasks, gained) * bdtr(most_lost[gains], tasks - gains, lost)).sum(1).max())
