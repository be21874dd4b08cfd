"""Statistics of means over evaluation text. Positions of one document hang together, so documents are the sample.

The mean of a ratio with its cluster-robust error (Cochran, Sampling Techniques, 1977, section 6; for model evaluation
Miller, arXiv 2411.00640), and bounds from Student's t.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit

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
    """Return how far the value is above ``limit``, and its standard error, on the scale where that is symmetric."""
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


def with_documents(estimate: Estimate, documents: int) -> Estimate:
    """Return the estimate as it would be of so many documents of the same kind, if its value is the true one."""
    ratio = documents / estimate.documents
    changed = {
        "standard_error": estimate.standard_error / math.sqrt(ratio),
        "documents": documents,
        "positions": round(estimate.positions * ratio),
    }
    return estimate.model_copy(update=changed)


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
