"""Tokens from logits: repeatable, from the nucleus, and as often as their probability says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from glmexport.engine.sampling import Sampling, Uniforms, choose, likelihood, nucleus

logits_of = arrays(np.float32, st.integers(2, 40), elements=st.floats(-30, 30, width=32))
uniforms = st.floats(0, 1, exclude_max=True)


def probabilities(logits: np.ndarray, temperature: float = 1) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


@given(logits=logits_of, uniform=uniforms, top_p=st.floats(0.01, 1))
def test_the_coldest_is_the_most_likely(logits: np.ndarray, uniform: float, top_p: float) -> None:
    assert choose(logits, Sampling(temperature=0, top_p=top_p), uniform) == int(logits.argmax())


@given(logits=logits_of, uniform=uniforms, top_p=st.floats(0.01, 0.99), temperature=st.floats(0.05, 2))
def test_no_token_from_outside_of_the_nucleus(
    logits: np.ndarray, uniform: float, top_p: float, temperature: float
) -> None:
    token = choose(logits, Sampling(temperature, top_p), uniform)
    weights = probabilities(logits, temperature)
    more_likely = weights[weights > weights[token]].sum()
    assert more_likely < top_p + 1e-9


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_as_often_as_probable(top_p: float) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    grid = (np.arange(2000) + 0.5) / 2000
    drawn = np.bincount([choose(logits, Sampling(1, top_p), uniform) for uniform in grid], minlength=4) / 2000
    wanted = np.array([0.5, 0.3, 0.15, 0.05]) if top_p == 1 else np.array([0.5, 0.3, 0.15, 0]) / 0.95
    assert np.abs(drawn - wanted).max() < 2e-3


@given(
    weights=arrays(np.float64, st.integers(1, 3000), elements=st.sampled_from([1.0, 2.0, 5.0, 100.0])),
    mass=st.floats(0.01, 1),
)
def test_the_nucleus_is_that_of_sorting_everything(weights: np.ndarray, mass: float) -> None:
    """Also where many are equal, and where more than the first are needed."""
    weights = weights / weights.sum()
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    kept = nucleus(weights, mass)
    assert kept.tolist() == order[: len(kept)]
    total = np.cumsum(weights[order])
    assert len(kept) == len(order) or total[len(kept) - 1] >= mass - 1e-9
    assert len(kept) == 1 or total[len(kept) - 2] < mass + 1e-9


def test_a_seed_gives_the_same_numbers_again() -> None:
    first, second = Uniforms(7), Uniforms(7)
    numbers = [first.next() for _ in range(50)]
    assert numbers == [second.next() for _ in range(50)] and len(set(numbers)) == 50
    assert numbers[0] != Uniforms(8).next() and Uniforms(2**64 - 1).next() < 1


@given(logits=logits_of, count=st.integers(0, 50))
def test_likelihoods(logits: np.ndarray, count: int) -> None:
    wanted = np.log(probabilities(logits) + 1e-300)
    found = likelihood(logits, 1, count)
    assert found.logprob == pytest.approx(wanted[1], abs=1e-6) and len(found.top) == min(count, len(logits))
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    assert [token for token, _ in found.top] == order[:count]
    assert all(logprob == pytest.approx(wanted[token], abs=1e-6) for token, logprob in found.top)
