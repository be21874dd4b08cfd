"""Divergence of two distributions, against cases done by hand and a plain version in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmexport.validation.divergence import Divergence, divergence


def plain(original: np.ndarray, bundle: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """The definition, one position at a time."""
    rows: dict[str, list[float]] = {name: [] for name in ("kl", "nll_original", "nll_bundle", "p_original", "p_bundle")}
    for first, second, target in zip(original.astype(np.float64), bundle.astype(np.float64), targets, strict=True):
        p = np.exp(first - first.max())
        q = np.exp(second - second.max())
        p, q = p / p.sum(), q / q.sum()
        rows["kl"].append(float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)))
        rows["nll_original"].append(-math.log(p[target]))
        rows["nll_bundle"].append(-math.log(q[target]))
        rows["p_original"].append(float(p.max()))
        rows["p_bundle"].append(float(q[p.argmax()]))
    return {name: np.array(values) for name, values in rows.items()}


def test_by_hand() -> None:
    # P is (1/2, 1/2) and Q is (1/4, 3/4); P is (4/5, 1/5) and Q its mirror image.
    original = torch.tensor([[1.0, 1.0], [math.log(4), 0.0]])
    bundle = torch.tensor([[0.0, math.log(3)], [0.0, math.log(4)]])
    result = divergence(original, bundle, torch.tensor([0, 1]))
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.6 * math.log(4)]
    assert result.kl.tolist() == pytest.approx(expected, rel=1e-6)
    assert result.nll_original.tolist() == pytest.approx([math.log(2), math.log(5)], rel=1e-6)
    assert result.nll_bundle.tolist() == pytest.approx([math.log(4), math.log(5 / 4)], rel=1e-6)
    assert result.top_original[1] == 0 and result.top_bundle.tolist() == [1, 1]
    assert result.p_original[1] == pytest.approx(0.8) and result.p_bundle[1] == pytest.approx(0.2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.1, 1.0, 10.0]), noise=st.sampled_from([1e-4, 0.1, 3.0]))
def test_against_the_plain_version(seed: int, scale: float, noise: float) -> None:
    rng = np.random.default_rng(seed)
    original = (rng.standard_normal((5, 33)) * scale).astype(np.float32)
    bundle = (original + rng.standard_normal((5, 33)) * noise).astype(np.float32)
    targets = rng.integers(0, 33, 5)
    result = divergence(*(torch.from_numpy(array) for array in (original, bundle, targets)))
    for name, expected in plain(original, bundle, targets).items():
        np.testing.assert_allclose(getattr(result, name).numpy(), expected, rtol=1e-5, atol=1e-12, err_msg=name)
    np.testing.assert_array_equal(result.top_original.numpy(), original.argmax(-1))
    np.testing.assert_array_equal(result.top_bundle.numpy(), bundle.argmax(-1))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shift=st.floats(-50, 50))
def test_never_negative_and_zero_for_the_same(seed: int, shift: float) -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(seed)) * 5
    other = logits + torch.randn(4, 100, generator=torch.Generator().manual_seed(seed + 1)) * 1e-6
    targets = torch.zeros(4, dtype=torch.int64)
    assert divergence(logits, logits, targets).kl.tolist() == [0, 0, 0, 0]
    assert bool((divergence(logits, other, targets).kl >= 0).all())
    # A constant on all logits changes no distribution; only its rounding to fp32 shows.
    assert float(divergence(logits, logits + shift, targets).kl.max()) < 1e-9


def test_small_differences_are_not_lost_to_rounding() -> None:
    # Second order: KL is half the variance of the difference under P.
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(1)).double()
    step = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(2)).double() * 1e-3
    p = logits.softmax(-1)
    expected = 0.5 * float((p * step**2).sum() - (p * step).sum() ** 2)
    # Differences of this size survive in fp32 logits because these are of order one.
    kl = divergence(logits.float(), (logits + step).float(), torch.tensor([0])).kl
    assert float(kl[0]) == pytest.approx(expected, rel=0.01)


def test_concatenation_keeps_the_order() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(3))
    other = logits.flip(0)
    targets = torch.arange(6)
    whole = divergence(logits, other, targets)
    parts = Divergence.concatenate(
        [divergence(logits[rows], other[rows], targets[rows]) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    )
    for name, value in vars(whole).items():
        assert torch.equal(getattr(parts, name), value), name
