"""Student's t without a library, against SciPy's."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtr, stdtrit

from glmexport.results.student import two_sided_quantile, two_sided_tail

FREEDOMS = st.floats(0, 6).map(lambda power: 10**power)


@given(FREEDOMS, st.floats(0, 200))
def test_tails(freedom: float, distance: float) -> None:
    expected = 2 * stdtr(freedom, -distance)
    assert two_sided_tail(freedom, distance) == pytest.approx(expected, rel=1e-12, abs=1e-300)


@given(FREEDOMS, st.floats(1e-9, 0.5))
def test_quantiles(freedom: float, tail: float) -> None:
    assert two_sided_quantile(freedom, tail) == pytest.approx(-stdtrit(freedom, tail / 2), rel=1e-12)


@pytest.mark.parametrize("freedom", [1, 2.5, 1e6])
def test_ends(freedom: float) -> None:
    assert two_sided_tail(freedom, 0) == pytest.approx(1, rel=1e-15)
    assert two_sided_tail(freedom, 1e308) < 1e-99
    assert two_sided_tail(freedom, math.inf) < 1e-99
