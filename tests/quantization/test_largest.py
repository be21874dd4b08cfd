"""The largest number that was seen, and by what."""

from __future__ import annotations

import pytest
import torch

from glmexport.quantization.largest import Largest, Seen


def test_the_largest_magnitude_of_both_signs_is_kept_with_its_place() -> None:
    largest = Largest()
    assert largest.take() is None
    largest.see(torch.tensor([[1.0, -3.0]]), "a")
    largest.see(torch.tensor([2.0]), "b")
    largest.see(torch.empty(0, 4), "c")
    assert largest.take() == Seen(3.0, "a")
    assert largest.take() is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_beyond_every_type(value: float) -> None:
    largest = Largest()
    largest.see(torch.tensor([1.0, value, 2.0]), "a")
    seen = largest.take()
    assert seen is not None and 65504 < seen.magnitude < float("inf")
