"""The divergence on a partition: a lower bound, exact where the partition is everything, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmexport.validation.divergence import divergence
from glmexport.validation.partition import Partition, partition, partition_divergence


def test_by_hand() -> None:
    # P = 1/2, 1/4, 1/8, 1/8 and Q uniform; kept are the first two, the others have 1/4 and 1/2 together.
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    targets = torch.tensor([3])
    kept = partition(logits, targets, 2)
    assert kept.tokens.tolist() == [[0, 1]]
    assert float(kept.log_tail) == pytest.approx(math.log(1 / 4))
    assert float(kept.nll) == pytest.approx(math.log(8))
    found = partition_divergence(kept, torch.zeros(1, 4), targets)
    assert float(found.kl) == pytest.approx(0.5 * math.log(2) + 0 + 0.25 * math.log(0.25 / 0.5), rel=1e-6)
    assert float(found.nll_bundle) == pytest.approx(math.log(4))
    assert float(found.p_original) == pytest.approx(0.5) and float(found.p_bundle) == pytest.approx(0.25)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.floats(0.1, 20))
def test_never_more_than_over_the_vocabulary_and_growing_with_k(seed: int, k: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(5, 40, generator=generator) * spread
    bundle = original + torch.randn(5, 40, generator=generator)
    targets = torch.randint(40, (5,), generator=generator)
    whole = divergence(original, bundle, targets)
    found = partition_divergence(partition(original, targets, k), bundle, targets)
    more = partition_divergence(partition(original, targets, k + 1), bundle, targets)
    slack = 1e-5 * (1 + whole.kl)
    assert bool((found.kl <= whole.kl + slack).all())
    assert bool((found.kl <= more.kl + slack).all())
    for name in ("nll_original", "nll_bundle", "top_original", "top_bundle", "p_original", "p_bundle"):
        assert torch.allclose(getattr(found, name).double(), getattr(whole, name).double(), atol=1e-5), name
    if k == 40:
        assert torch.allclose(found.kl, whole.kl, atol=1e-5)


def test_equal_answers_do_not_diverge() -> None:
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)) * 4
    targets = torch.zeros(64, dtype=torch.int64)
    # fp32 is what the original's probabilities are kept in: its rounding must not look like divergence.
    assert float(partition_divergence(partition(logits, targets, 50), logits, targets).kl.max()) < 1e-9


def test_what_is_broken_stays_visible() -> None:
    logits = torch.zeros(1, 4)
    targets = torch.tensor([0])
    nothing = torch.full((1, 4), float("nan"))
    assert math.isnan(float(partition_divergence(partition(logits, targets, 2), nothing, targets).kl))
    certain = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]])
    assert float(partition_divergence(partition(logits, targets, 2), certain, targets).kl) == math.inf
    # Of a token that the original itself excludes, nothing is asked.
    kept = partition(certain, targets, 2)
    assert float(partition_divergence(kept, logits, targets).kl) == pytest.approx(math.log(4))


def test_positions_are_joined() -> None:
    logits, targets = torch.randn(6, 9), torch.arange(6)
    whole = partition(logits, targets, 3)
    parts = [partition(logits[each], targets[each], 3) for each in (slice(0, 4), slice(4, 6))]
    joined = Partition.concatenate(parts)
    for name, tensor in vars(whole).items():
        assert torch.equal(tensor, getattr(joined, name)), name
