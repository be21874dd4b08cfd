"""Second moments are the naive sum of outer products, however the rows are cut into batches."""

from __future__ import annotations

import pytest
import torch

from glmexport.calibration.hessian import Hessian, SecondMoment


def test_it_is_the_naive_sum() -> None:
    random = torch.Generator().manual_seed(2)
    inputs, differences = torch.randn(35, 24, generator=random) * 3, torch.randn(35, 9, generator=random)
    expected = torch.zeros(9, 24, dtype=torch.float64)
    for x, d in zip(inputs.double(), differences.double(), strict=True):
        expected += torch.outer(d, x)
    for batch in (1, 4, 35):
        moment = SecondMoment(9, 24)
        for left, right in zip(differences.split(batch), inputs.split(batch), strict=True):
            moment.add(left, right)
        torch.testing.assert_close(moment.matrix.double(), expected, rtol=1e-5, atol=1e-5)
        assert moment.matrix.dtype == torch.float32


@pytest.mark.parametrize("size", [24, 192, 500])
def test_of_the_same_on_both_sides_it_is_a_hessian(size: int) -> None:
    inputs = torch.randn(50, size, generator=torch.Generator().manual_seed(0))
    hessian, moment = Hessian(size), SecondMoment(size, size)
    for batch in inputs.split(20):
        hessian.add(batch)
        moment.add(batch, batch)
    torch.testing.assert_close(hessian.matrix(), moment.matrix)
    assert torch.equal(hessian.matrix(), hessian.matrix().T)
    # Asking does not end it.
    hessian.add(inputs)
    moment.add(inputs, inputs)
    torch.testing.assert_close(hessian.matrix(), moment.matrix)
