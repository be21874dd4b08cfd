"""Statistics of the differences between the figures of two bundles.

The difference of two means (Welch, Biometrika 34, 1947), and Holm's correction (Scand. J. Statist. 6, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from glmexport.results.fidelity import Estimate
from glmexport.results.student import two_sided_quantile, two_sided_tail

_NORMAL = NormalDist()


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
    reach = two_sided_quantile(freedom, 1 - confidence) * error
    return Difference(value, value - reach, value + reach, two_sided_tail(freedom, abs(value) / error))


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
    # A bound that is passed in half of all cases, or in more, says nothing of the error.
    error = math.hypot(*spans) / 2 / _NORMAL.inv_cdf(reached) if 0.5 < reached < 1 else math.inf
    if not math.isfinite(error):
        return Difference(value, -math.inf, math.inf, 1.0)
    if error == 0:
        return Difference(value, value, value, 0.0 if value else 1.0)
    reach = _NORMAL.inv_cdf((1 + confidence) / 2) * error
    return Difference(value, value - reach, value + reach, math.erfc(abs(value) / error / math.sqrt(2)))


def _error(estimate: Estimate) -> float:
    """The standard error; where nothing or everything has the share, as if one position more had it or had it not."""
    if estimate.documents < 2:
        return math.inf
    if estimate.kind == "share" and estimate.value in (0, 1):
        return max(estimate.standard_error, 1 / (1 + estimate.positions))
    return estimate.standard_error
