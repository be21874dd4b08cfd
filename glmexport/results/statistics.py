"""Statistics of means over evaluation text. Positions of one document hang together, so documents are the sample.

The mean of a ratio with its cluster-robust error (Cochran, Sampling Techniques, 1977, section 6; for model evaluation
Miller, arXiv 2411.00640), bounds from Student's t, the difference of two means (Welch, Biometrika 34, 1947), and Holm's
correction (Scand. J. Statist. 6, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from glmexport.results.fidelity import Estimate

#: A sample without the rare large values looks both better and surer than it is. Taken at a third of the risk, the
#: upper bound of a mean whose documents differ by e^0.5 is passed in less than 5 % of samples; without that in more.
_SKEWED = 3

#: Share of samples in which enough documents are to decide.
POWER = 0.8
_MOST_DOCUMENTS = 20_000

#: Kind of the estimate, as in ``Estimate.kind``.
Kind = Literal["signed", "positive", "share"]


def clustered_mean(sums: ArrayLike, counts: ArrayLike, kind: Kind) -> Estimate:
    """Return the mean over all positions, and its standard error.

    Args:
        sums: [D], over the positions of each document.
        counts: [D], positions of each document, at least 1.
        kind: of quantity. The error of a share is at least that of as many independent positions.
    """
    totals, sizes = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    documents, positions = len(totals), float(sizes.sum())
    mean = float(totals.sum() / positions)
    error = math.inf
    if documents > 1:
        with np.errstate(invalid="ignore", over="ignore"):
            squares = float(np.square(totals - mean * sizes).sum())
        error = math.sqrt(squares * documents / (documents - 1)) / positions if math.isfinite(squares) else math.inf
        if kind == "share":
            error = max(error, math.sqrt(mean * (1 - mean) / positions))
    return Estimate(value=mean, standard_error=error, documents=documents, positions=int(positions), kind=kind)


def bounds(estimate: Estimate, confidence: float) -> tuple[float, float]:
    """Return lower and upper bound; the true mean is beyond each in one case of 1 / (1 - ``confidence``).

    The upper bound of a share of which nothing was seen is that of as many independent positions without a single case,
    1 - (1 - confidence)^(1 / positions).
    """
    value, error = estimate.value, estimate.standard_error
    if not math.isfinite(value):
        return value, value
    if not math.isfinite(error):
        return (-math.inf if estimate.kind == "signed" else 0.0), math.inf
    if estimate.kind == "share" and value == 0:
        return 0.0, -math.expm1(math.log1p(-confidence) / estimate.positions)
    below = above = float(stdtrit(estimate.documents - 1, confidence)) * error
    if estimate.kind == "signed" or value == 0:
        return value - below, value + above
    if estimate.kind == "positive":
        above = float(stdtrit(estimate.documents - 1, 1 - (1 - confidence) / _SKEWED)) * error
    return value * math.exp(-below / value), value * math.exp(min(above / value, 700.0))


def _above(estimate: Estimate, limit: float) -> tuple[float, float]:
    """How far the value is above ``limit``, and its standard error, on the scale where that is symmetric."""
    if estimate.kind == "signed":
        return estimate.value - limit, estimate.standard_error
    if estimate.value <= 0:
        return -math.inf, 0.0
    return math.log(estimate.value / limit), estimate.standard_error / estimate.value


def p_value(estimate: Estimate, limit: float) -> float:
    """Return the chance of a mean this large or larger if the true one were ``limit``; it is small for a mean above it.

    What is not finite is above every limit.
    """
    if not math.isfinite(estimate.value):
        return 0.0
    if not math.isfinite(estimate.standard_error):
        return 1.0
    distance, error = _above(estimate, limit)
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stdtr(estimate.documents - 1, -distance / error))


def documents_needed(estimate: Estimate, limit: float, confidence: float, tests: int = 1) -> int | None:
    """Return how many documents of the same kind surely keep, or surely break, the limit in four of five samples.

    If the value found is the true one. Below the limit they are for the upper bound to keep it, above it for the
    strictest of as many ``tests`` of Holm's. None where no number would do, or nothing says how many.
    """
    distance, error = _above(estimate, limit)
    if estimate.documents < 2 or not (math.isfinite(distance) and distance and math.isfinite(error)):
        return None
    risk = 1 - confidence
    if distance > 0:
        risk /= tests
    elif estimate.kind == "positive":
        risk /= _SKEWED
    ratio = (error / distance) ** 2 * estimate.documents
    number = np.arange(2, _MOST_DOCUMENTS)
    enough = number >= ratio * (stdtrit(number - 1, 1 - risk) + stdtrit(number - 1, POWER)) ** 2
    # The more documents, the smaller the quantiles: from the first number that suffices on, all do.
    return int(number[enough.argmax()]) if enough[-1] else None


def showable_limit(estimate: Estimate, confidence: float) -> float | None:
    """Return the smallest limit that as many documents would surely keep in four of five samples.

    If the value is the true one. None where nothing says how far documents differ.
    """
    value, error = estimate.value, estimate.standard_error
    if estimate.documents < 2 or not (math.isfinite(value) and math.isfinite(error)):
        return None
    risk = (1 - confidence) / (_SKEWED if estimate.kind == "positive" else 1)
    reach = float(stdtrit(estimate.documents - 1, 1 - risk) + stdtrit(estimate.documents - 1, POWER)) * error
    if estimate.kind == "signed":
        return value + reach
    if value <= 0:
        return bounds(estimate, confidence)[1]
    return value * math.exp(min(reach / value, 700.0))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Return which hypotheses fall, so that the chance of a single wrong one among them stays below ``alpha``."""
    fallen = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        fallen[index] = True
    return fallen


@dataclass(frozen=True)
class Difference:
    """The difference of two independent estimates, the second less the first."""

    value: float
    #: The true difference is outside of both together in one case of 1 / (1 - confidence).
    lower: float
    upper: float
    #: Chance of a difference this large in either direction if there were none.
    p_value: float


def difference(old: Estimate, new: Estimate, confidence: float) -> Difference:
    """Return ``new`` less ``old``, taken as independent: standard errors in quadrature, and Welch's t.

    Means whose documents are the same hang together, mostly so that what is hard for one is hard for the other: then
    the interval is wider than it need be. What is not finite differs surely from what is, and not from its like.
    """
    value = new.value - old.value
    if not (math.isfinite(old.value) and math.isfinite(new.value)):
        alike = math.isfinite(old.value) == math.isfinite(new.value)
        return Difference(value, -math.inf, math.inf, 1.0) if alike else Difference(value, value, value, 0.0)
    errors = [_error(each) for each in (old, new)]
    error = math.hypot(*errors)
    if not math.isfinite(error):
        return Difference(value, -math.inf, math.inf, 1.0)
    if error == 0:
        return Difference(value, value, value, 0.0 if value else 1.0)
    # Welch and Satterthwaite; an estimate without error has no share in the degrees of freedom.
    shares = [(part / error) ** 4 / (each.documents - 1) for part, each in zip(errors, (old, new), strict=True) if part]
    freedom = 1 / sum(shares)
    reach = float(stdtrit(freedom, (1 + confidence) / 2)) * error
    return Difference(value, value - reach, value + reach, float(2 * stdtr(freedom, -abs(value) / error)))


def log_ratio(
    old: tuple[float, float, float], new: tuple[float, float, float], reached: float, confidence: float
) -> Difference:
    """Return ln(``new`` / ``old``) of two independent positive figures, each given as value, lower and upper bound.

    Each bound is passed in one case of 1 / (1 - ``reached``). Half the logarithm of upper over lower is that many
    normal quantiles of the standard error; the errors of both add in quadrature.
    """
    value = math.log(new[0] / old[0])
    spans = (
        math.log(upper / lower) if lower > 0 and math.isfinite(upper) else math.inf for _, lower, upper in (old, new)
    )
    error = math.hypot(*spans) / 2 / float(ndtri(reached))
    if not math.isfinite(error):
        return Difference(value, -math.inf, math.inf, 1.0)
    if error == 0:
        return Difference(value, value, value, 0.0 if value else 1.0)
    reach = float(ndtri((1 + confidence) / 2)) * error
    return Difference(value, value - reach, value + reach, float(2 * ndtr(-abs(value) / error)))


def _error(estimate: Estimate) -> float:
    """The standard error; where nothing or everything has the share, as if one position more had it or had it not."""
    if estimate.documents < 2:
        return math.inf
    if estimate.kind == "share" and estimate.value in (0, 1):
        return max(estimate.standard_error, 1 / (1 + estimate.positions))
    return estimate.standard_error
