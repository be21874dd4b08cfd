"""Levels of looks against published tables, a naive simulation and an independent integral, and what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from glmexport.validation.sequential import ALL_TEXT, Stage, first_crossings, levels

#: Of K equally spaced looks, two-sided level 0.05 (Jennison and Turnbull, 1999, tables 2.1 and 2.3).
POCOCK = {2: 2.178, 3: 2.289, 4: 2.361, 5: 2.413, 10: 2.555}
O_BRIEN_FLEMING = {2: 1.977, 3: 2.004, 4: 2.024, 5: 2.040, 10: 2.087}
UNEVEN = (1 / 8, 1 / 4, 1 / 2, 1.0)


def equal(looks: int) -> tuple[float, ...]:
    return tuple(look / looks for look in range(1, looks + 1))


@pytest.mark.parametrize("looks", POCOCK)
def test_published_boundaries_spend_what_they_should(looks: int) -> None:
    """One side of a two-sided test of 5 %: to the digits that are printed, 2.5 %."""
    fractions = equal(looks)
    assert sum(first_crossings([POCOCK[looks]] * looks, fractions)) == pytest.approx(0.025, abs=4e-5)
    falling = [O_BRIEN_FLEMING[looks] / math.sqrt(fraction) for fraction in fractions]
    assert sum(first_crossings(falling, fractions)) == pytest.approx(0.025, abs=4e-5)


def test_levels_of_a_published_spending() -> None:
    """Kim and DeMets with power 1, five equal looks, 2.5 % on one side; and O'Brien and Fleming's is near power 3."""
    boundaries = stats.norm.isf(levels(equal(5), 0.025, 1.0))
    assert boundaries == pytest.approx([2.576, 2.492, 2.411, 2.339, 2.276], abs=6e-4)
    assert sum(first_crossings(list(boundaries), equal(5))) == pytest.approx(0.025, abs=1e-12)
    late = levels(equal(5), 0.025, 3.0)
    assert late[0] == pytest.approx(0.025 / 125) and stats.norm.isf(late[-1]) == pytest.approx(2.040, abs=0.01)


def test_the_integral_is_that_of_the_normal_distribution() -> None:
    """Two looks, where both are one distribution function of two variables."""
    first, second, fraction = 2.1, 1.7, 0.6
    found = first_crossings([first, second], [fraction, 1.0])
    below = stats.multivariate_normal([0, 0], [[1, math.sqrt(fraction)], [math.sqrt(fraction), 1]]).cdf
    assert found[0] == pytest.approx(stats.norm.sf(first))
    assert found[1] == pytest.approx(stats.norm.cdf(first) - below([first, second]), abs=1e-9)


@pytest.mark.parametrize("fractions", [UNEVEN, (3 / 5, 1.0), equal(4)])
def test_sums_of_normal_variables_pass_as_rarely_as_they_should(fractions: tuple[float, ...]) -> None:
    random, number = np.random.default_rng(5), 200_000
    steps = np.sqrt(np.diff([0.0, *fractions]))
    statistics = (random.standard_normal((number, len(fractions))) * steps).cumsum(1) / np.sqrt(fractions)
    beyond = statistics > stats.norm.isf(levels(fractions, 0.05))
    assert np.mean(beyond.any(1)) == pytest.approx(0.05, abs=0.0015)
    # In proportion to the sample, look by look.
    first = np.where(beyond.any(1), beyond.argmax(1), -1)
    for look, fraction in enumerate(fractions):
        assert np.mean((first >= 0) & (first <= look)) == pytest.approx(0.05 * fraction, abs=0.0015)


@pytest.mark.parametrize("risk", [0.05, 0.05 / 63, 1e-6])
@pytest.mark.parametrize("fractions", [UNEVEN, (3 / 5, 1.0), (1 / 3, 5 / 9, 1.0)])
def test_a_p_value_of_all_looks_is_the_risk_whose_level_was_reached(risk: float, fractions: tuple[float, ...]) -> None:
    for look, level in enumerate(levels(fractions, risk)):
        stage = Stage(fractions, look)
        assert stage.p_value(level) == pytest.approx(risk, rel=1e-5)
        assert stage.p_value(level * 1.01) > risk > stage.p_value(level * 0.99)
        assert stage.confidence(1 - risk) == pytest.approx(1 - level)


def test_p_values_grow_and_stay_p_values() -> None:
    stage = Stage(UNEVEN, 2)
    found = [stage.p_value(p) for p in (0.0, 1e-300, 1e-13, 1e-11, 1e-4, 0.02, 0.2, 0.4, 0.9, 1.0)]
    assert found == sorted(found) and found[0] == 0 and found[-1] == 1
    assert all(each >= p for each, p in zip(found, (0.0, 1e-300, 1e-13, 1e-11, 1e-4, 0.02, 0.2, 0.4), strict=False))


def test_one_look_changes_nothing() -> None:
    for p in (0.0, 0.013, 0.7, 1.0):
        assert ALL_TEXT.p_value(p) == p
    assert ALL_TEXT.confidence(0.95) == 0.95 and levels((1.0,), 0.05) == (0.05,)


def test_the_last_look_has_what_is_left() -> None:
    """By hand: of two looks at three fifths and all, the first has 3 %, and the last at least 2 % and less than 5 %."""
    first, last = levels((0.6, 1.0), 0.05)
    assert first == pytest.approx(0.03) and 0.02 < last < 0.05
