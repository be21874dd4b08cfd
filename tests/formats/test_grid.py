"""The grid of one group: hand-checked cases, and a search that may only improve on min-max."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import generator
from torch import Tensor

from glmexport.formats.grid import decode, encode, minmax_grid, searched_grid, stored_scale
from glmexport.foundation.recipe import Format

ASYMMETRIC = Format(bits=4, group_size=16)
SYMMETRIC = Format(bits=4, group_size=16, symmetric=True)
FORMS = [ASYMMETRIC, SYMMETRIC, Format(bits=8, group_size=16), Format(bits=8, group_size=16, symmetric=True)]
form_cases = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.label)


def error(group: Tensor, importance: Tensor, grid: tuple[Tensor, Tensor], bits: int) -> Tensor:
    """Importance-weighted squared error of every row, in double precision."""
    residual = (decode(encode(group, *grid, bits), *grid) - group).double()
    return importance.double() @ residual.square()


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
@settings(deadline=None)
def test_a_stored_scale_is_what_fp16_holds(values: list[float]) -> None:
    scale = torch.tensor(values)
    stored = stored_scale(scale)
    assert torch.equal(stored.half().float(), stored)
    assert bool((stored != 0).all()) and bool(stored.isfinite().all())
    assert torch.equal(stored.sign()[scale != 0], scale.sign()[scale != 0])
    assert bool((stored[scale == 0] == 1).all())
    normal = (scale.abs() >= 2.0**-14) & (scale.abs() <= 65504)
    torch.testing.assert_close(stored[normal], scale[normal], rtol=2.0**-11, atol=0)


def test_scales_outside_fp16_end_at_its_limits() -> None:
    stored = stored_scale(torch.tensor([1e-12, -1e-12, 1e9, -1e9, 0.0, -0.0]))
    assert stored.tolist() == [2.0**-24, -(2.0**-24), 65504.0, -65504.0, 1.0, 1.0]


def test_asymmetric_min_max_by_hand() -> None:
    group = column(-1.5, 0.0, 3.0, 6.0)
    scale, zero_point = minmax_grid(group, ASYMMETRIC)
    assert (scale.item(), zero_point.item()) == (0.5, 3.0)
    codes = encode(group, scale, zero_point, 4)
    assert codes[:, 0].tolist() == [0, 3, 9, 15]
    assert torch.equal(decode(codes, scale, zero_point), group)


@pytest.mark.parametrize("values,zero", [((1.0, 2.0, 7.5), 0), ((-7.5, -2.0, -1.0), 15)])
def test_an_asymmetric_range_always_includes_zero(values: tuple[float, ...], zero: int) -> None:
    scale, zero_point = minmax_grid(column(*values), ASYMMETRIC)
    assert (scale.item(), zero_point.item()) == (0.5, zero)


@pytest.mark.parametrize(
    "values,step,codes",
    [((4.0, -1.0, 0.5, -3.5), -0.5, [0, 10, 7, 15]), ((-4.0, 1.0, -0.5, 3.5), 0.5, [0, 10, 7, 15])],
)
def test_symmetric_min_max_by_hand(values: tuple[float, ...], step: float, codes: list[int]) -> None:
    """The largest weight, of either sign, is held exactly by code 0, which has no counterpart."""
    group = column(*values)
    scale, zero_point = minmax_grid(group, SYMMETRIC)
    assert (scale.item(), zero_point.item()) == (step, 8.0)
    found = encode(group, scale, zero_point, 4)
    assert found[:, 0].tolist() == codes
    assert torch.equal(decode(found, scale, zero_point), group)


@form_cases
@pytest.mark.parametrize("search", [False, True])
def test_a_group_of_zeros_stays_exactly_zero(form: Format, search: bool) -> None:
    group = torch.zeros(16, 3)
    grid = searched_grid(group, torch.ones(16), form) if search else minmax_grid(group, form)
    assert bool((decode(encode(group, *grid, form.bits), *grid) == 0).all())


@form_cases
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("constant", [0.37, -0.37, 1e-6, -1e3])
def test_a_constant_group_is_held_as_well_as_fp16_can(form: Format, search: bool, constant: float) -> None:
    group = torch.full((16, 1), constant)
    grid = searched_grid(group, torch.ones(16), form) if search else minmax_grid(group, form)
    restored = decode(encode(group, *grid, form.bits), *grid)
    # Below fp16's normal range the step is off by up to 2^-25, and the constant is at most 255 steps.
    torch.testing.assert_close(restored, group, rtol=2.0**-10, atol=2.0 ** (form.bits - 25))


@form_cases
def test_min_max_is_off_by_half_a_step_at_most(form: Format) -> None:
    group = torch.randn(16, 200, generator=generator(1))
    scale, zero_point = minmax_grid(group, form)
    off = (decode(encode(group, scale, zero_point, form.bits), scale, zero_point) - group).abs()
    # At the ends of the range, rounding the scale to fp16 and the zero point to a code can cost more; and a
    # symmetric grid has one code less on the side where the smaller extreme lies.
    inner = off.sort(0).values[:-2]
    assert bool((inner <= scale.abs() * 0.501).all())
    assert bool((off <= scale.abs() * 1.2).all())


@form_cases
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 8), spread=st.floats(-3, 3))
@settings(deadline=None, max_examples=30)
def test_the_search_is_never_worse_than_min_max(form: Format, seed: int, rows: int, spread: float) -> None:
    random = generator(seed)
    group = torch.randn(form.group_size, rows, generator=random) * 10**spread + torch.randn(rows, generator=random)
    importance = torch.rand(form.group_size, generator=random) ** 4
    importance[torch.rand(form.group_size, generator=random) < 0.2] = 0
    searched, full = searched_grid(group, importance, form), minmax_grid(group, form)
    assert torch.equal(searched[0].half().float(), searched[0])
    assert bool(((searched[1] >= 0) & (searched[1] < 2**form.bits) & (searched[1] == searched[1].round())).all())
    found, allowed = (error(group, importance, grid, form.bits) for grid in (searched, full))
    assert bool((found <= allowed * (1 + 1e-5) + 1e-30).all())


@pytest.mark.parametrize("form", [ASYMMETRIC, SYMMETRIC], ids=lambda form: form.label)
def test_the_search_gives_up_an_outlier_that_does_not_matter(form: Format) -> None:
    group = torch.randn(16, 100, generator=generator(2)) * 0.05
    group[5] = 0.4
    importance = torch.ones(16)
    importance[5] = 1e-3
    found, full = (
        error(group, importance, grid, 4).sum()
        for grid in (searched_grid(group, importance, form), minmax_grid(group, form))
    )
    assert found < 0.65 * full


@form_cases
def test_rows_do_not_depend_on_one_another(form: Format) -> None:
    group, importance = torch.randn(16, 6, generator=generator(3)), torch.rand(16, generator=generator(4))
    scale, zero_point = searched_grid(group, importance, form)
    for row in range(6):
        alone = searched_grid(group[:, row : row + 1], importance, form)
        assert (alone[0].item(), alone[1].item()) == (scale[row].item(), zero_point[row].item())
