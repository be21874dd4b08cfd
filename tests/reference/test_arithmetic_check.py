"""A route is taken only if its products are those of fp32 and it is surely faster, and leaves torch as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glmexport.reference import arithmetic_check
from glmexport.reference.arithmetic import DEFAULT, ONEDNN, ROUTES, Route, computing
from glmexport.reference.arithmetic_check import (
    LARGEST_ERROR,
    Checked,
    Product,
    check,
    fastest,
    moments_ratio,
    products,
)
from glmexport.results.arithmetic import OriginalArithmetic

#: Whatever multiplies two matrices, which are its last two arguments.
PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in ("linear", "matmul", "mm", "addmm", "addmm_", "bmm", "mv", "addmv", "addmv_")
}
ONE = Route("one")
OTHER = Route("other")


@pytest.fixture(scope="module")
def tried() -> list[Product]:
    return products()


def precisions() -> tuple[str, ...]:
    backends = torch.backends
    return (
        backends.mkldnn.matmul.fp32_precision,
        backends.mkldnn.conv.fp32_precision,
        backends.mkldnn.rnn.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
    )


@pytest.mark.parametrize("route", ROUTES.values(), ids=list(ROUTES))
@pytest.mark.parametrize("before", ["none", "ieee", "bf16"])
def test_a_route_ends_with_its_context(route: Route, before: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = before
    try:
        outside = precisions()
        with pytest.raises(KeyError), computing(OriginalArithmetic(route=route.name)):
            assert torch.backends.mkldnn.matmul.fp32_precision == route.onednn
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            # Nothing but products is computed otherwise.
            assert precisions()[1:3] == outside[1:3] and precisions()[4] == outside[4]
            with DEFAULT.computing():
                assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == route.onednn
            raise KeyError
        assert precisions() == outside
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_the_default_is_right(tried: list[Product]) -> None:
    with DEFAULT.computing():
        errors = {product.name: product.error() for product in tried}
    assert len(errors) == len(tried)
    assert all(0 < error < LARGEST_ERROR / 4 for error in errors.values()), errors


def test_what_is_asked_of_onednn_is_as_exact_or_refused(tried: list[Product]) -> None:
    found = check(ONEDNN, tried)
    assert (found.relative_error <= LARGEST_ERROR) or found.refused
    assert found.refused or min(found.ratios) > 1


class Replaced(TorchDispatchMode):
    """Computes every product of two matrices by ``instead``, given torch's own and its arguments."""

    def __init__(self, instead: Callable[..., Tensor]) -> None:
        super().__init__()
        self._instead = instead

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            return self._instead(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Foreign(Route):
    """A route that torch does not have."""

    instead: Callable[..., Tensor]

    @contextmanager
    def computing(self) -> Iterator[None]:
        with Replaced(type(self).instead):
            yield


def rounded(matrix: Tensor, bits: int) -> Tensor:
    """To so many bits of a significand."""
    mantissa, exponent = torch.frexp(matrix)
    return torch.ldexp(torch.round(mantissa * 2**bits) / 2**bits, exponent)


def rounding(bits: int) -> Callable[..., Tensor]:
    def instead(func: Any, *operands: Tensor, **options: Any) -> Tensor:
        *others, left, right = operands
        result: Tensor = func(*others, rounded(left, bits), rounded(right, bits), **options)
        return result

    return instead


def thin_ones(func: Any, *operands: Tensor, **options: Any) -> Tensor:
    """Rounds to bf16 where one number of each is multiplied."""
    return (rounding(8) if operands[-1].shape[-2:-1] == (1,) else exact)(func, *operands, **options)


def exact(func: Any, *operands: Tensor, **options: Any) -> Tensor:
    result: Tensor = func(*operands, **options)
    return result


def not_numbers(func: Any, *operands: Tensor, **options: Any) -> Tensor:
    return exact(func, *operands, **options).fill_(math.nan)


def thrice(func: Any, *operands: Tensor, **options: Any) -> Tensor:
    for _ in range(2):
        # As much work, of which nothing is kept.
        exact(func, *(operand.clone() for operand in operands), **options)
    return exact(func, *operands, **options)


@pytest.mark.parametrize(
    ("instead", "least"),
    [
        (rounding(8), 5e-4),  # bf16
        (rounding(11), 5e-5),  # TF32
        (thin_ones, 5e-4),
        (not_numbers, math.inf),
    ],
    ids=["bf16", "TF32", "angles alone", "NaN"],
)
def test_products_that_round_are_refused(instead: Callable[..., Tensor], least: float, tried: list[Product]) -> None:
    route = type("Bad", (Foreign,), {"instead": staticmethod(instead)})("bad")
    found = check(route, tried)
    assert found.relative_error >= least
    assert found.refused and "relative error" in found.refused
    # Nobody waits for the speed of what is wrong.
    assert found.ratios == ()
    assert fastest([found]) is None


def test_every_product_can_refuse(tried: list[Product]) -> None:
    """None of them is there for nothing: each one alone sees a type of 8 bits."""
    with Replaced(rounding(8)), torch.inference_mode():
        errors = {product.name: product.error() for product in tried}
    assert all(error > LARGEST_ERROR for error in errors.values()), errors


def test_the_same_speed_is_not_faster(tried: list[Product]) -> None:
    route = type("Slow", (Foreign,), {"instead": staticmethod(thrice)})("slow")
    found = check(route, tried)
    assert found.relative_error <= LARGEST_ERROR
    assert len(found.ratios) == 1 and found.ratios[0] < 1
    assert found.refused and "as fast as torch's default" in found.refused
    assert fastest([found]) is None


@pytest.mark.parametrize(
    ("error", "ratios", "taken"),
    [
        (1e-7, (1.2, 1.15, 3.0), True),
        (1e-7, (3.0, 1.14, 3.0), False),
        (1e-7, (), False),
        (1e-5, (2.0,), True),
        (1.01e-5, (2.0,), False),
        (math.nan, (2.0,), False),
    ],
)
def test_what_is_taken(error: float, ratios: tuple[float, ...], taken: bool) -> None:
    found = Checked(ONE, error, ratios)
    assert (found.refused is None) == taken
    assert fastest([found]) == (found if taken else None)


def test_the_fastest_is_that_of_the_best_worst_turn() -> None:
    first, second = Checked(ONE, 1e-7, (1.5, 1.5)), Checked(OTHER, 1e-7, (9.0, 1.3))
    wrong = Checked(DEFAULT, 1e-3, (9.0, 9.0))
    assert fastest([second, wrong, first]) == first
    assert first.arithmetic() == OriginalArithmetic(route="one", relative_error=1e-7, speed_ratio=1.5)
    assert fastest([wrong]) is None


def test_moments_are_coarse_only_where_products_of_bf16_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([2.0, 1.0] * 4)
    monkeypatch.setattr(arithmetic_check, "_seconds", lambda *_: next(seconds))
    found = []
    for bits in (7, 8):
        route = type("Rounding", (Foreign,), {"instead": staticmethod(rounding(bits))})("rounding")
        products_of = partial(lambda route, *, coarse: route.computing() if coarse else nullcontext(), route)
        monkeypatch.setattr(arithmetic_check, "exact_products", products_of)
        found.append(moments_ratio(DEFAULT))
    # A significand of bf16 has 8 bits.
    assert found == [None, 2.0]
