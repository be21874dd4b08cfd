"""Calibration text may pass the blocks in bf16: what is rounded, what is not, and when it is chosen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from glmexport.reference import arithmetic_check
from glmexport.reference.arithmetic import DEFAULT, Route
from glmexport.reference.arithmetic_check import LEAST_RATIO, coarse_ratio, moments_ratio
from glmexport.reference.coarse import CoarseLinear, coarse_product, make_coarse
from glmexport.report.arithmetic import brief_arithmetic, told_arithmetic
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic


def test_inputs_weights_and_outputs_are_rounded_to_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(5, 64, generator=generator), torch.randn(7, 64, generator=generator)
    exact = inputs.bfloat16().double() @ weight.bfloat16().double().T
    found = coarse_product(inputs, weight)
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())
    # bf16 has 8 bits: half of the last one is 2^-9, and sums are of fp32.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


def test_a_linear_adds_its_bias_in_fp32_and_gives_its_weight_back() -> None:
    linear = nn.Linear(16, 8)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.bfloat16())
        linear.bias.fill_(1 + 2.0**-12)
    coarse, inputs = CoarseLinear(linear), torch.zeros(3, 16)
    assert torch.equal(coarse(inputs), linear.bias.expand(3, 8))
    assert torch.equal(coarse.weight.float(), linear.weight)


def test_every_linear_with_a_weight_is_made_coarse_and_nothing_else() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with torch.device("meta"):
        absent = nn.Linear(4, 4)
    module = nn.ModuleDict({"inner": inner, "absent": absent, "norm": nn.LayerNorm(4)})
    names = {name for name, _ in module.named_parameters()}
    make_coarse(module)
    assert isinstance(inner[0], CoarseLinear)
    assert isinstance(module["absent"], nn.Linear) and isinstance(module["norm"], nn.LayerNorm)
    assert {name for name, _ in module.named_parameters()} == names


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        # Turns of fp32 and bf16 products, one after the other.
        ([2.0, 1.0] * 4, 2.0),
        ([2.0, 1.0, 3.0, 1.0, 2.0, 1.0, 1.5, 1.0], 1.5),
        ([2.0, 1.0, 1.0, 1.0], None),
        ([1.0, 2.0], None),
    ],
)
@pytest.mark.parametrize("chosen", [coarse_ratio, moments_ratio])
def test_it_is_chosen_only_where_it_is_faster_in_every_turn(
    chosen: Callable[[Route], float | None],
    seconds: list[float],
    expected: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = iter(seconds)
    monkeypatch.setattr(arithmetic_check, "_seconds", lambda *_: next(turns))
    assert chosen(DEFAULT) == expected
    assert next(turns, None) is None
    assert expected is None or expected >= LEAST_RATIO


def test_the_label_says_what_the_bytes_depend_on() -> None:
    assert UNCHECKED.label == "fp32"
    assert OriginalArithmetic(route="onednn", coarse_ratio=2.0).label == "onednn+bf16"
    assert OriginalArithmetic(route="onednn").label == "onednn"
    both = OriginalArithmetic(route="fp32", coarse_ratio=2.0, moments_ratio=1.5)
    assert both.label == "fp32+bf16+moments"
    assert "Hessians" in told_arithmetic(both) and "Hessians" in brief_arithmetic(both)
