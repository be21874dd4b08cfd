"""Student's t distribution, for machines without a library of statistics.

The tail is the integral of the density, taken by the double exponential rule for half-infinite intervals (Takahasi and
Mori, Publ. RIMS 9, 1974). Every term is positive, so no digits cancel: from 1 to a million degrees of freedom it has 12
digits at least.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

_STEP = 1 / 16
_GRID = np.arange(-4, 4, _STEP)
#: The places at which the rule takes the integrand, from the lower end on, and their weights.
_PLACES = np.exp(np.pi / 2 * np.sinh(_GRID))
_WEIGHTS = _STEP * np.pi / 2 * np.cosh(_GRID) * _PLACES
#: Smallest argument at which the series of a ratio of gamma functions is exact to rounding; below it, the functions
#: are not too large.
_LARGE = 100.0


def two_sided_tail(freedom: float, distance: float) -> float:
    """Return the probability that |T| exceeds ``distance``, at least 0, with ``freedom`` >= 1 degrees of freedom."""
    # Squares of larger ones are no numbers; at this one nothing is left that a test could use.
    distance = min(distance, 1e100)
    # Over about this length the density falls by a factor of e.
    length = (freedom + distance**2) / ((freedom + 1) * distance) if distance > 1 else 1.0
    values = distance + length * _PLACES
    kernel = np.exp(-(freedom + 1) / 2 * np.log1p(values / freedom * values))
    return min(1.0, 2 * length * _peak(freedom) * float((_WEIGHTS * kernel).sum()))


def two_sided_quantile(freedom: float, tail: float) -> float:
    """Return the distance that |T| exceeds with probability ``tail``, between 0 and 1."""
    low, high = 0.0, abs(NormalDist().inv_cdf(tail / 2))
    while two_sided_tail(freedom, high) > tail:
        low, high = high, 2 * high + 1
    # Newton's method on the logarithm of the tail, which is nearly straight; where it leaves the bracket, halving.
    distance = high
    for _ in range(100):
        found = two_sided_tail(freedom, distance)
        low, high = (distance, high) if found > tail else (low, distance)
        density = _peak(freedom) * math.exp(-(freedom + 1) / 2 * math.log1p(distance / freedom * distance))
        following = distance + math.log(found / tail) * found / (2 * density)
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - distance) <= 1e-15 * distance:
            break
        distance = following
    return distance


def _peak(freedom: float) -> float:
    """Return the density at 0."""
    half = freedom / 2
    if half < _LARGE:
        ratio = math.gamma(half + 0.5) / math.gamma(half)
    else:
        ratio = math.sqrt(half) * math.exp(-1 / (8 * half) + 1 / (192 * half**3) - 1 / (640 * half**5))
    return ratio / math.sqrt(math.pi * freedom)
