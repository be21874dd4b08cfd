"""The factorization in blocks against LAPACK's, and against what it is of."""

from __future__ import annotations

import pytest
import torch
from matrices import correlated, generator
from torch import Tensor

from glmexport.quantization import cholesky as module
from glmexport.quantization.cholesky import cholesky, cholesky_solve

#: Less than a triangle, as large, between triangle and block, a block, one more, and several with a rest.
SIZES = [1, 5, 8, 9, 24, 25, 100]
sizes = pytest.mark.parametrize("size", SIZES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 24)
    monkeypatch.setattr(module, "_TRIANGLE", 8)


def positive(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A positive definite matrix in that type."""
    matrix = correlated(size).double() + 0.01 * torch.eye(size, dtype=torch.float64)
    return ((matrix + matrix.T) / 2).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@sizes
@dtypes
def test_the_factor_is_lapack_s(size: int, dtype: torch.dtype) -> None:
    matrix = positive(size, dtype)
    before = matrix.clone()
    lower = cholesky(matrix)
    assert lower is not None and lower.dtype == dtype
    assert torch.equal(matrix, before)
    assert torch.equal(lower, lower.tril())
    exact = torch.linalg.cholesky(matrix.double())
    theirs = error(torch.linalg.cholesky(matrix), exact)
    assert error(lower, exact) <= 4 * theirs + 32 * torch.finfo(dtype).eps
    assert error(lower.double() @ lower.double().T, matrix) <= 4 * torch.finfo(dtype).eps


@sizes
@dtypes
@pytest.mark.parametrize("columns", [1, 7, 40])
def test_what_is_solved_is_lapack_s(size: int, columns: int, dtype: torch.dtype) -> None:
    matrix = positive(size, dtype)
    lower = torch.linalg.cholesky(matrix)
    right = torch.randn(columns, size, generator=generator(3)).to(dtype).T
    before = right.clone()
    solved = cholesky_solve(right, lower)
    assert torch.equal(right, before)
    exact = torch.linalg.solve(lower.double() @ lower.double().T, right.double())
    theirs = error(torch.cholesky_solve(right, lower), exact)
    assert error(solved, exact) <= 4 * theirs + 32 * torch.finfo(dtype).eps


def test_by_hand() -> None:
    matrix = torch.tensor([[4.0, 2.0, 6.0], [2.0, 10.0, 0.0], [6.0, 0.0, 14.0]])
    expected = torch.tensor([[2.0, 0.0, 0.0], [1.0, 3.0, 0.0], [3.0, -1.0, 2.0]])
    for block in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_BLOCK", block)
            patch.setattr(module, "_TRIANGLE", 1)
            lower = cholesky(matrix)
            assert lower is not None
            assert torch.equal(lower, expected)
            # 1, 1 and 1.
            assert torch.equal(cholesky_solve(matrix.sum(1, keepdim=True), lower), torch.ones(3, 1))


@pytest.mark.parametrize("place", [0, 20, 24, 60, 99])
def test_a_matrix_that_is_not_positive_definite(place: int) -> None:
    matrix = positive(100, torch.float32)
    matrix[place, place] = -1
    assert cholesky(matrix) is None
    assert int(torch.linalg.cholesky_ex(matrix).info)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number(wrong: float) -> None:
    matrix = positive(100, torch.float32)
    matrix[70, 30] = matrix[30, 70] = wrong
    assert cholesky(matrix) is None
