"""The Cholesky factorization and what is solved with it, in blocks, so that nearly all of it is products of matrices.

LAPACK's routines are those of torch's default library, whatever library computes products. Here they only factor a
block, or solve a triangle.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Columns of a matrix that are factored together, and those of which a triangle is solved together.
_BLOCK, _TRIANGLE = 256, 128


def cholesky(matrix: Tensor) -> Tensor | None:
    """Return the lower factor L [K, K] of a symmetric ``matrix`` = L L^T; None where it is not positive definite.

    Everything is computed in the precision of ``matrix``.
    """
    lower = matrix.clone()
    for start, stop in _blocks(0, len(lower), _BLOCK):
        corner, failed = torch.linalg.cholesky_ex(lower[start:stop, start:stop])
        if int(failed) or not bool(torch.isfinite(corner.diagonal()).all()):
            return None
        lower[start:stop, start:stop] = corner
        below = lower[stop:, start:stop]
        _forwards(corner, below.T)
        for first, last in _blocks(stop, len(lower), _BLOCK):
            # Up to the diagonal alone: the other half is not read.
            rows, columns = below[first - stop :], below[first - stop : last - stop]
            lower[first:, first:last].addmm_(rows, columns.T, alpha=-1)
    return lower.tril_()


def cholesky_solve(right: Tensor, lower: Tensor) -> Tensor:
    """Return X [K, N] of L L^T X = ``right`` [K, N]."""
    solved = right.clone(memory_format=torch.contiguous_format)
    _forwards(lower, solved)
    for start, stop in reversed([*_blocks(0, len(lower), _TRIANGLE)]):
        part = solved[start:stop]
        part.addmm_(lower[stop:, start:stop].T, solved[stop:], alpha=-1)
        part.copy_(torch.linalg.solve_triangular(lower[start:stop, start:stop].T, part, upper=True))
    return solved


def cholesky_operations(size: int) -> float:
    """Return the operations of factoring a matrix of that ``size``; a multiply-add is two.

    They are a third of the cube, and what whole blocks on the diagonal compute of its other half.
    """
    operations = 0.0
    for start, stop in _blocks(0, size, _BLOCK):
        block = stop - start
        operations += block**3 / 3 + block**2 * (size - stop)
        operations += sum(2.0 * block * (size - first) * (last - first) for first, last in _blocks(stop, size, _BLOCK))
    return operations


def solving_operations(size: int, columns: float) -> float:
    """Return the operations of solving with a factor of that ``size`` for so many ``columns``, both ways."""
    return 2.0 * size**2 * columns


def _forwards(lower: Tensor, right: Tensor) -> None:
    """Replace ``right`` [K, N] by X of L X = ``right``."""
    for start, stop in _blocks(0, len(lower), _TRIANGLE):
        part = right[start:stop]
        part.addmm_(lower[start:stop, :start], right[:start], alpha=-1)
        part.copy_(torch.linalg.solve_triangular(lower[start:stop, start:stop], part, upper=False))


def _blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
