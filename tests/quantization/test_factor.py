"""H = (U + I) D (U + I)^T in the order of the sweep."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from matrices import correlated, generator
from torch import Tensor

from glmexport.quantization import factor as module
from glmexport.quantization.factor import Factor, factorize
from glmexport.quantization.order import ColumnOrder, column_order

orders = pytest.mark.parametrize("kind", ["stored", "group"])


def problem(kind: Literal["group", "stored"], size: int = 88) -> tuple[Tensor, ColumnOrder, Factor]:
    spread = torch.rand(size, generator=generator(1)) + 0.5
    hessian = correlated(size) * spread * spread[:, None]
    order = column_order(hessian.diagonal(), 32, kind)
    factor = factorize(hessian, order, 0.01)
    assert factor is not None
    return hessian, order, factor


def damped(hessian: Tensor, order: ColumnOrder, factor: Factor) -> Tensor:
    """In sweep order, in double precision."""
    return hessian[order.columns][:, order.columns].double() + torch.diag(factor.added).double()


@orders
@pytest.mark.parametrize("block", [1, 7, 32, 88])
def test_the_factors_multiply_to_the_damped_hessian(kind: Literal["group", "stored"], block: int) -> None:
    hessian, order, factor = problem(kind)
    size = len(hessian)
    upper, diagonal = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for start in range(0, size, block):
        stop = min(start + block, size)
        columns, conditional = factor.columns(start, stop)
        assert columns.shape == (stop, stop - start)
        upper[:stop, start:stop], diagonal[start:stop] = columns, conditional
    assert torch.equal(upper.diagonal(), torch.ones(size, dtype=torch.float64))
    assert torch.equal(upper, upper.triu())
    assert bool((diagonal > 0).all())
    expected = damped(hessian, order, factor)
    assert (upper * diagonal @ upper.T - expected).abs().max() <= 1e-4 * expected.abs().max()


@orders
def test_rows_of_the_damped_hessian_in_sweep_order(kind: Literal["group", "stored"]) -> None:
    hessian, order, factor = problem(kind)
    expected = damped(hessian, order, factor)
    for start, stop in (*order.bounds, (0, 88)):
        torch.testing.assert_close(factor.hessian_rows(start, stop).double(), expected[start:stop], rtol=1e-6, atol=0)


@orders
def test_what_is_added_to_the_diagonal(kind: Literal["group", "stored"]) -> None:
    """A hundredth of the mean of the columns that live; a dead column gets their mean on top."""
    hessian, order, _ = problem(kind)
    dead = [4, 40, 41]
    hessian[dead], hessian[:, dead] = 0, 0
    factor = factorize(hessian, order, 0.01)
    assert factor is not None
    assert (factor.damping, factor.dead_columns) == (0.01, 3)
    alive = hessian.diagonal()[hessian.diagonal() > 0].mean()
    expected = torch.full((88,), 0.01 * float(alive))
    expected[dead] = 1.01 * alive
    torch.testing.assert_close(factor.added, expected[order.columns])
    for step in (step for step, column in enumerate(order.columns.tolist()) if column in dead):
        columns, conditional = factor.columns(step, step + 1)
        assert bool((columns[:step] == 0).all())
        assert conditional.item() == pytest.approx(1.01 * float(alive), rel=1e-5)


@orders
def test_a_hessian_may_be_consumed(kind: Literal["group", "stored"], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no copy of it is made; the slabs in which it is permuted make no difference."""
    hessian, order, factor = problem(kind)
    before = hessian.clone()
    monkeypatch.setattr(module, "_SLAB", 13)
    again = factorize(hessian, order, 0.01)
    assert again is not None and torch.equal(hessian, before)
    consumed = factorize(hessian, order, 0.01, consume=True)
    assert consumed is not None and consumed.hessian.data_ptr() == hessian.data_ptr()
    for other in (again, consumed):
        assert torch.equal(other.hessian, factor.hessian) and torch.equal(other.lower, factor.lower)
        assert torch.equal(other.added, factor.added)


def singular_problem(size: int = 256) -> tuple[Tensor, ColumnOrder]:
    """Rank one: with little damping, fp32 cannot hold it beside the diagonal."""
    token = torch.randn(size, generator=generator(2)).sign()
    hessian = torch.outer(token, token)
    return hessian, column_order(hessian.diagonal(), 32, "stored")


def test_what_fp32_cannot_factor_is_factored_in_fp64_at_the_same_damping() -> None:
    hessian, order = singular_problem()
    assert int(torch.linalg.cholesky_ex(hessian + 1e-8 * torch.eye(256)).info)
    factor = factorize(hessian, order, 1e-8)
    assert factor is not None and (factor.damping, factor.double) == (1e-8, True)
    assert factor.lower.dtype == factor.hessian.dtype == torch.float32
    expected = torch.linalg.cholesky(damped(hessian, order, factor).flip(0, 1))
    torch.testing.assert_close(factor.lower.double(), expected, rtol=1e-5, atol=1e-8)
    _, conditional = factor.columns(0, 256)
    # The input of a column is known from the m columns behind it, but for the damping: d (1 + 1 / m) is left of it.
    behind = torch.arange(255, 0, -1, dtype=torch.float64)
    torch.testing.assert_close(conditional[:-1].double(), 1e-8 * (1 + 1 / behind), rtol=1e-3, atol=0)


def test_fp64_is_not_tried_where_it_is_not_needed_or_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not problem("stored")[2].double
    singular, order = singular_problem()
    monkeypatch.setattr(module, "DOUBLE_LIMIT", 255)
    raised = factorize(singular, order, 1e-8)
    assert raised is not None and not raised.double and raised.damping > 1.5e-8


def test_what_is_not_positive_semidefinite_needs_more_damping_in_fp64_too() -> None:
    values, vectors = torch.linalg.eigh(correlated(64).double())
    values[0] = -0.05 * values.mean()
    hessian = ((vectors * values) @ vectors.T).float()
    factor = factorize(hessian, column_order(hessian.diagonal(), 32, "stored"), 0.01)
    assert factor is not None and factor.damping == pytest.approx(0.1) and not factor.double
