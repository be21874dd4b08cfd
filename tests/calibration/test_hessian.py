"""Second moments are the naive sum of outer products, however the rows are cut into batches."""

from __future__ import annotations

import torch

from glmexport.calibration import SecondMoment


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


def test_with_itself_it_is_symmetric() -> None:
    inputs = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    hessian = SecondMoment(24, 24)
    hessian.add(inputs, inputs)
    torch.testing.assert_close(hessian.matrix, hessian.matrix.T, rtol=1e-6, atol=1e-6)
    assert float(torch.linalg.eigvalsh(hessian.matrix).min()) > 0
