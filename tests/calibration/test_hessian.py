"""The Hessian of a tap is the weighted sum of x x^T, however it is cut into batches."""

from __future__ import annotations

import torch

from glmexport.calibration import CrossMoment, Hessian


def test_the_hessian_is_the_naive_sum() -> None:
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 5, 24, generator=random) * 3
    weights = torch.rand(7, generator=random)
    weights /= weights.sum() * 5
    expected = torch.zeros(24, 24, dtype=torch.float64)
    for sequence, weight in zip(inputs.double(), weights.double(), strict=True):
        for x in sequence:
            expected += weight * torch.outer(x, x)
    for batch in (1, 3, 7):
        hessian = Hessian(24)
        for start in range(0, 7, batch):
            hessian.add(inputs[start : start + batch], weights[start : start + batch])
        torch.testing.assert_close(hessian.matrix.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hessian.matrix, hessian.matrix.T, rtol=1e-6, atol=1e-6)
        assert hessian.matrix.dtype == torch.float32


def test_the_cross_moment_is_the_naive_sum() -> None:
    random = torch.Generator().manual_seed(2)
    inputs = torch.randn(7, 5, 24, generator=random)
    differences = torch.randn(7, 5, 9, generator=random)
    weights = torch.rand(7, generator=random)
    expected = torch.zeros(9, 24, dtype=torch.float64)
    for sequence in range(7):
        for x, d in zip(inputs[sequence].double(), differences[sequence].double(), strict=True):
            expected += weights[sequence].double() * torch.outer(d, x)
    cross = CrossMoment(9, 24)
    for start in (0, 4):
        stop = min(start + 4, 7)
        cross.add(differences[start:stop], inputs[start:stop], weights[start:stop])
    torch.testing.assert_close(cross.matrix.double(), expected, rtol=1e-5, atol=1e-5)


def test_inputs_are_left_as_they_were() -> None:
    inputs, weights = torch.ones(2, 3, 4), torch.full((2,), 0.5)
    Hessian(4).add(inputs, weights)
    assert bool((inputs == 1).all()) and bool((weights == 0.5).all())


def test_inputs_that_are_slices() -> None:
    """As the walk gives them: without the positions of the prefix."""
    inputs = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    hessian, copied = Hessian(4), Hessian(4)
    hessian.add(inputs[:, 2:], torch.ones(3))
    copied.add(inputs[:, 2:].clone(), torch.ones(3))
    assert torch.equal(hessian.matrix, copied.matrix)
