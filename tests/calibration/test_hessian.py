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


def test_coarse_ones_are_exact_for_rounded_inputs() -> None:
    """However the processor multiplies bf16: the exact product of rounded numbers, not a rounded product."""
    random = torch.Generator().manual_seed(1)
    inputs, differences = torch.randn(300, 400, generator=random), torch.randn(300, 70, generator=random)
    # Channels of very different sizes, and values near the middle between two numbers of bf16.
    inputs[:, ::40] *= 1000
    inputs[:, 1::2] = inputs[:, 1::2].bfloat16().float() * (1 + 2.0**-9)
    exact_inputs, exact_differences = (values.bfloat16().double() for values in (inputs, differences))
    hessian, moment = Hessian(400, coarse=True), SecondMoment(70, 400, coarse=True)
    for rows in (slice(0, 60), slice(60, 270), slice(270, 300)):
        hessian.add(inputs[rows])
        moment.add(differences[rows], inputs[rows])
    for found, exact in (
        (hessian.matrix(), exact_inputs.T @ exact_inputs),
        (moment.matrix, exact_differences.T @ exact_inputs),
    ):
        missed = torch.linalg.vector_norm(found.double() - exact, dim=-1)
        assert float((missed / torch.linalg.vector_norm(exact, dim=-1)).max()) < 1e-6
    plain = Hessian(400)
    plain.add(inputs)
    assert not torch.allclose(plain.matrix(), hessian.matrix(), rtol=1e-6)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
