"""Tests that look at a growing sample several times, and may stop at each: the level of every look.

The risk of a wrong decision is spent over the looks as the sample grows (Lan and DeMets, Biometrika 70, 1983), in
proportion to a power of its size (Kim and DeMets, Biometrika 74, 1987). Levels follow from the chance that a Brownian
motion, which is what a sum of many documents comes to, passes a boundary for the first time (Armitage, McPherson and
Rowe, J. R. Statist. Soc. A 132, 1969; Jennison and Turnbull, Group Sequential Methods, 1999, chapters 7 and 19). For
small samples the level, not the boundary, is carried over to Student's t (ibid., section 3.8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

#: Power of the fraction of the text that has its share of the risk: benchmarks/sequential.py has others.
POWER_OF_SPENDING = 1.0
#: Standard deviations beyond which nothing is integrated. No chance above 1e-18 is there.
_FARTHEST = 9.0
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)
#: P-values below this, and risks above that, are only bounded.
_SMALLEST, _LARGEST = 1e-12, 0.5


class _Motion:
    """A Brownian motion that has passed no boundary yet: where it is at its last look, as nodes and their chances."""

    def __init__(self) -> None:
        self._time = 0.0
        self._places: NDArray[np.float64] = np.zeros(1)
        self._chances: NDArray[np.float64] = np.ones(1)

    def beyond(self, boundary: float, time: float) -> float:
        """Return the chance that the next look, at ``time``, is the first to be beyond ``boundary``.

        Boundaries are those of the motion divided by the root of ``time``, which has variance 1.
        """
        step = math.sqrt(time - self._time)
        return float(self._chances @ ndtr((self._places - boundary * math.sqrt(time)) / step))

    def excess(self, boundary: float, time: float, part: float) -> float:
        """Return the logarithm of the chance to be beyond ``boundary`` over ``part``."""
        return math.log(self.beyond(boundary, time) / part)

    def go_on(self, boundary: float, time: float) -> None:
        """Go on to ``time`` without those that are beyond ``boundary`` there."""
        scale, variance = math.sqrt(time), time - self._time
        low, high = -_FARTHEST * scale, min(boundary, _FARTHEST) * scale
        places = low + (high - low) * (_NODES + 1) / 2
        density = np.exp(-np.square(places[:, None] - self._places) / (2 * variance)) @ self._chances
        self._chances = density * _WEIGHTS * (high - low) / 2 / math.sqrt(2 * math.pi * variance)
        self._places, self._time = places, time


def first_crossings(boundaries: Sequence[float], fractions: Sequence[float]) -> list[float]:
    """Return the chance of every look to be the first whose statistic is beyond its boundary, if there is no effect.

    Args:
        boundaries: [K], of statistics that have a standard normal distribution at each look.
        fractions: [K], increasing, of the whole sample at each look; the statistics of looks s < t have the
            correlation sqrt(s / t).
    """
    motion, chances = _Motion(), []
    for boundary, fraction in zip(boundaries, fractions, strict=True):
        chances.append(motion.beyond(boundary, fraction))
        motion.go_on(boundary, fraction)
    return chances


def spent(fraction: float, risk: float, power: float = POWER_OF_SPENDING) -> float:
    """Return how much of ``risk`` may be spent when ``fraction`` of the text was looked at."""
    return float(risk * fraction**power)


@lru_cache(maxsize=1024)
def levels(fractions: tuple[float, ...], risk: float, power: float = POWER_OF_SPENDING) -> tuple[float, ...]:
    """Return the level of a one-sided test at each look, [K], so that one is wrong at any look with chance ``risk``.

    Args:
        fractions: [K], increasing, of the whole sample at each look, at most 1.
        risk: of the looks together once the fraction is 1, below 0.5.
        power: of the fraction in what may be spent.
    """
    motion, before = _Motion(), 0.0
    found: list[float] = []
    for fraction in fractions:
        now = spent(fraction, risk, power)
        part = now - before
        boundary = -float(ndtri(part))
        if found:
            # The level of a look is at least what is spent there, and at most what is spent up to there.
            boundary = float(brentq(motion.excess, -float(ndtri(now)), boundary + 1e-9, (fraction, part), xtol=1e-13))
        found.append(float(ndtr(-boundary)) if found else part)
        motion.go_on(boundary, fraction)
        before = now
    return tuple(found)


@dataclass(frozen=True)
class Stage:
    """One of the looks at a sample: ``fractions`` [K] of the whole at each, increasing to 1, and its index."""

    fractions: tuple[float, ...] = (1.0,)
    look: int = 0

    def confidence(self, confidence: float) -> float:
        """Return the confidence of a bound at this look, so that those of all looks together have ``confidence``."""
        if len(self.fractions) == 1:
            return confidence
        return 1 - levels(self.fractions, 1 - confidence)[self.look]

    def is_significant(self, p_value: float, risk: float) -> bool:
        """Return whether a ``p_value`` of this look alone is significant at a ``risk`` of all looks together."""
        return p_value <= levels(self.fractions, risk)[self.look]

    def p_value(self, p_value: float) -> float:
        """Return the smallest risk of all looks together at which a ``p_value`` of this one alone is significant.

        It is a p-value itself, whenever the looks ended. Above one half it is only known to be at most 1.
        """
        if len(self.fractions) == 1 or p_value <= 0:
            return p_value
        seen = self.fractions[: self.look + 1]
        whole = spent(seen[-1], 1.0)
        part = whole - (spent(seen[-2], 1.0) if self.look else 0.0)
        # Between these the level of the look passes p_value, by what ``levels`` says of its bounds.
        least, most = p_value / whole, p_value / part
        if p_value < _SMALLEST or not self.look:
            return min(most, 1.0)
        if least >= _LARGEST or levels(seen, _LARGEST)[-1] <= p_value:
            return 1.0

        def excess(risk: float) -> float:
            return levels(seen, risk)[-1] - p_value

        return float(brentq(excess, least, min(most, _LARGEST), xtol=1e-18, rtol=1e-9))


#: The whole sample in a single look.
ALL_TEXT = Stage()
