"""The check of a route on the spot: the error of its products against fp64, and their speed in turns with the default.

What is tried are the shapes that cost: a linear of width 4,096, a slab of a Hessian, and the scores of attention. An
error that such inputs hide shows in others: activations with a few channels a thousand times as large, sums that
cancel, and the angles of positions, which a type of few bits cannot count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from glmexport.reference.arithmetic import DEFAULT, ONEDNN, Route
from glmexport.reference.coarse import Rounding, coarse_product, exact_products
from glmexport.results.arithmetic import OriginalArithmetic

#: The largest relative error of a product that is fp32's: fp32 itself has 3e-7 here, TF32 and bf16 3e-4 and 2e-3.
LARGEST_ERROR = 1e-5
#: The least ratio of speeds in every turn of a route that is surely faster than the default.
LEAST_RATIO = 1.15
_TURNS, _REPEATS = 4, 3

#: Rows of activations, their width, outputs of the linear, and rows of a Hessian that are added to together.
_ROWS, _WIDTH, _OUTPUTS, _SLAB = 512, 4096, 1024, 192
#: Outputs of a linear that is not timed.
_FEW = 256
_HEADS, _LENGTH, _HEAD_SIZE = 8, 256, 128
#: One row and one column in so many of each result are compared.
_EVERY = 16
_OUTLIERS, _OUTLIER_SCALE = 8, 1000.0
#: The share of a sum that is left where it cancels.
_LEFT = 2.0**-10
_LONGEST_CONTEXT = 131_072


@dataclass(frozen=True)
class Product:
    """A product of fp32 matrices whose result is known."""

    name: str
    compute: Callable[[], Tensor]
    #: Every 16th row and column of the result [..., m, n], fp64.
    exact: Tensor
    #: The size of each of these rows [..., m], or of what cancels in it.
    scale: Tensor
    #: Multiplications and additions; 0 where the product says nothing of speed.
    operations: int = 0

    def error(self) -> float:
        """Return the largest error of a row, relative to its size; infinite where that is not a number."""
        found = self.compute()[..., ::_EVERY, ::_EVERY].double()
        worst = float((torch.linalg.vector_norm(found - self.exact, dim=-1) / self.scale).max())
        return worst if math.isfinite(worst) else math.inf


@dataclass(frozen=True)
class Checked:
    """The findings of the check of one route."""

    route: Route
    relative_error: float
    #: The ratio of its speed to the default's in every turn; empty where it was refused before, or is the default.
    ratios: tuple[float, ...] = ()

    @property
    def refused(self) -> str | None:
        """The reason why the route is not taken; None if it may be."""
        if not self.relative_error <= LARGEST_ERROR:
            return f"its relative error of {self.relative_error:.1e} is above {LARGEST_ERROR:.0e}"
        if not self.ratios or min(self.ratios) < LEAST_RATIO:
            told = f"{min(self.ratios):.2f} times" if self.ratios else "not"
            return f"it was {told} as fast as torch's default in one turn, and has to be {LEAST_RATIO} times in each"
        return None

    def arithmetic(self) -> OriginalArithmetic:
        """Return the record of the route and of the findings."""
        ratio = min(self.ratios) if self.ratios else None
        return OriginalArithmetic(route=self.route.name, relative_error=self.relative_error, speed_ratio=ratio)


def check(route: Route, tried: Sequence[Product]) -> Checked:
    """Measure the error of the products ``tried`` by ``route`` and, where that is small enough, their speed.

    Turns end with the first one that is not fast enough.
    """
    error = largest_error(route, tried)
    if route == DEFAULT or not error <= LARGEST_ERROR:
        return Checked(route, error)
    computations = [product.compute for product in tried if product.operations]
    ratios: list[float] = []
    while len(ratios) < _TURNS and (not ratios or ratios[-1] >= LEAST_RATIO):
        before, after = (_seconds(each, computations) for each in (DEFAULT, route))
        ratios.append(before / after)
    return Checked(route, error, tuple(ratios))


def largest_error(route: Route, tried: Iterable[Product]) -> float:
    """Return the largest relative error of the products ``tried`` by ``route``."""
    with route.computing(), torch.inference_mode():
        return max(product.error() for product in tried)


def fastest(found: Sequence[Checked]) -> Checked | None:
    """Return the fastest route that is not refused; None if all are."""
    taken = [each for each in found if each.refused is None]
    return max(taken, key=lambda each: min(each.ratios), default=None)


def _seconds(route: Route, computations: Sequence[Callable[[], Tensor]]) -> float:
    """Return the time of all ``computations`` together, the best of a few."""
    best = math.inf
    with route.computing(), torch.inference_mode():
        for _ in range(_REPEATS):
            started = time.perf_counter()
            for compute in computations:
                compute()
            best = min(best, time.perf_counter() - started)
    return best


def coarse_ratio(route: Route) -> float | None:
    """Return the least ratio of the speed of bf16 products to those of ``route``; None unless it is surely higher.

    What is timed begins and ends in fp32, as a linear among others does. Turns end with the first that is not enough.
    """
    inputs, weight = _normal(_ROWS, _WIDTH), _normal(_OUTPUTS, _WIDTH).bfloat16()
    same = weight.float()
    return _least_ratio(route, lambda: linear(inputs, same), lambda: coarse_product(inputs, weight))


def moments_ratio(route: Route) -> float | None:
    """Return the same of adding inputs to a moment, whose products have to be as exact as those of fp32.

    What is timed and tried is one slab of rows, with the rounding of the inputs that it is made of.
    """
    inputs, moment = _normal(_ROWS, _WIDTH), torch.zeros(_SLAB, _WIDTH)
    rounding = {coarse: Rounding(coarse=coarse) for coarse in (False, True)}
    inputs[:, :: _WIDTH // _OUTLIERS] *= _OUTLIER_SCALE

    def add(*, coarse: bool) -> Tensor:
        rows = rounding[coarse](inputs)
        with exact_products(coarse=coarse):
            return moment.addmm_(rows[:, -_SLAB:].T, rows)

    before, exact = _normal(_SLAB, _WIDTH), inputs.bfloat16().double()
    moment.copy_(before)
    product = _product("moment", lambda: add(coarse=True), (before + exact[:, -_SLAB:].T @ exact)[::_EVERY, ::_EVERY])
    if not ONEDNN.offered or not largest_error(route, [product]) <= LARGEST_ERROR:
        return None
    return _least_ratio(route, lambda: add(coarse=False), lambda: add(coarse=True))


def _least_ratio(route: Route, fine: Callable[[], Tensor], coarse: Callable[[], Tensor]) -> float | None:
    """Return the least ratio of the time of ``fine`` to that of ``coarse`` in turns; None unless it is surely more."""
    ratios: list[float] = []
    while len(ratios) < _TURNS and (not ratios or ratios[-1] >= LEAST_RATIO):
        before, after = (_seconds(route, [each]) for each in (fine, coarse))
        ratios.append(before / after)
    return min(ratios) if min(ratios) >= LEAST_RATIO else None


def _normal(*shape: int) -> Tensor:
    """Return random numbers of the standard normal distribution; the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def products() -> list[Product]:
    """Return the products that a route is tried on; always the same numbers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = normal(_ROWS, _WIDTH)
    # As checkpoints have them.
    weight = normal(_OUTPUTS, _WIDTH).bfloat16().float()
    outliers = inputs.clone()
    outliers[:, :: _WIDTH // _OUTLIERS] *= _OUTLIER_SCALE
    first, second = inputs.chunk(2, 1)
    cancelling = torch.cat([first, _LEFT * second - first], 1)
    few = weight[:_FEW]
    twice = few[:, : _WIDTH // 2].repeat(1, 2)
    cancelled = first[::_EVERY].double() @ twice[::_EVERY, : _WIDTH // 2].double().T
    queries, keys = normal(_HEADS, _LENGTH, _HEAD_SIZE), normal(_HEADS, _LENGTH, _HEAD_SIZE)
    return [
        _linear("linear", inputs, weight, timed=True),
        _linear("linear, outliers", outliers, few),
        _linear("linear, sums that cancel", cancelling, twice, torch.linalg.vector_norm(cancelled, dim=-1)),
        _hessian(inputs, normal(_SLAB, _WIDTH), timed=True),
        _hessian(outliers, normal(_SLAB, _WIDTH)),
        _scores(queries, keys),
        _vector(inputs, weight),
        _angles(),
    ]


def _product(
    name: str, compute: Callable[[], Tensor], exact: Tensor, scale: Tensor | None = None, operations: int = 0
) -> Product:
    size = torch.linalg.vector_norm(exact, dim=-1) if scale is None else scale
    return Product(name, compute, exact, size, operations)


def _linear(name: str, inputs: Tensor, weight: Tensor, scale: Tensor | None = None, *, timed: bool = False) -> Product:
    exact = inputs[::_EVERY].double() @ weight[::_EVERY].double().T
    operations = 2 * inputs.numel() * len(weight) if timed else 0
    return _product(name, lambda: linear(inputs[None], weight)[0], exact, scale, operations)


def _hessian(inputs: Tensor, before: Tensor, *, timed: bool = False) -> Product:
    """A slab of a Hessian that is added to: rows of a larger matrix, from a transposed part of the inputs."""
    matrix = torch.zeros(2 * _SLAB, _WIDTH)
    part = inputs[:, -_SLAB:]

    def compute() -> Tensor:
        slab = matrix[_SLAB:].copy_(before)
        return slab.addmm_(part.T, inputs)

    exact = before[::_EVERY, ::_EVERY] + part[:, ::_EVERY].double().T @ inputs[:, ::_EVERY].double()
    return _product(
        "Hessian" if timed else "Hessian, outliers",
        compute,
        exact,
        operations=2 * _SLAB * inputs.numel() if timed else 0,
    )


def _scores(queries: Tensor, keys: Tensor) -> Product:
    exact = queries[:, ::_EVERY].double() @ keys[:, ::_EVERY].double().transpose(1, 2)
    operations = 2 * queries.numel() * keys.shape[1]
    return _product("scores", lambda: queries @ keys.transpose(1, 2), exact, operations=operations)


def _vector(inputs: Tensor, weight: Tensor) -> Product:
    exact = (weight[::_EVERY].double() @ inputs[0].double())[None]
    return _product("vector", lambda: (weight @ inputs[0])[None], exact)


def _angles() -> Product:
    """Every position of a long context times the frequencies of a rotary embedding, as transformers multiplies them."""
    frequencies = 10_000.0 ** -torch.linspace(0, 1, _HEAD_SIZE // 2)[:, None]
    positions = torch.arange(_LONGEST_CONTEXT - _WIDTH, _LONGEST_CONTEXT).float()[None]
    exact = frequencies[::_EVERY].double() @ positions[:, ::_EVERY].double()
    return _product("angles", lambda: frequencies @ positions, exact)
