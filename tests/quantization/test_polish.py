"""Polishing: every round can only lower the error, and each step is the best there is."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from matrices import correlated, output_error, weights
from torch import Tensor

from glmexport.formats.codecs import codec_of
from glmexport.formats.nearest import round_to_nearest
from glmexport.foundation.recipe import Format
from glmexport.quantization.factor import Factor, factorize
from glmexport.quantization.order import ColumnOrder, column_order
from glmexport.quantization.polish import polish
from glmexport.quantization.solve import Sweep

FORMS = [
    Format(bits=4, group_size=16),
    Format(bits=4, group_size=16, symmetric=True),
    Format(bits=4, group_size=64),
    Format(bits=8, group_size=16),
    Format(bits=8, group_size=32, symmetric=True),
]
form_cases = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.label)


class Case:
    """A matrix rounded to nearest in the checkpoint's order, and a correlated Hessian: much to polish."""

    def __init__(self, form: Format, size: int = 80, rows: int = 12) -> None:
        self.form = form
        weight, hessian = weights(rows, size), correlated(size)
        self.order: ColumnOrder = column_order(hessian.diagonal(), form.group_size, "stored")
        factor = factorize(hessian, self.order, 0.01)
        assert factor is not None
        self.factor: Factor = factor
        self.damped = hessian.double() + torch.diag(factor.added).double()
        linear = round_to_nearest(weight, form)
        middle = torch.full(linear.scales.shape, float(2 ** (form.bits - 1)))
        points = middle if linear.zero_points is None else linear.zero_points.float()
        self.sweep = Sweep(
            weight.T.clone(),
            linear.codes.T.clone(),
            linear.scales.float().T.clone(),
            points.T.clone(),
            (weight - linear.dequantize()).T.clone(),
        )

    def polish(self, rounds: int) -> None:
        polish(self.sweep, self.factor, self.order, codec_of(self.form), rounds=rounds)

    def spread(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(self.form.group_size, 0)[: len(self.sweep.weights)]

    def restored(self) -> Tensor:
        """[K, N] in double precision, from codes, scales and zero points."""
        sweep = self.sweep
        centred = sweep.codes.double() - self.spread(sweep.zero_points).double()
        return centred * self.spread(sweep.scales).double()

    def objective(self) -> float:
        return output_error((self.sweep.weights.double() - self.restored()).T, self.damped)


@form_cases
def test_no_round_makes_the_error_larger(form: Format) -> None:
    case = Case(form)
    errors = [case.objective()]
    for _ in range(6):
        case.polish(1)
        errors.append(case.objective())
    assert errors[1] < 0.9 * errors[0]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))


@form_cases
def test_the_error_is_kept_up_to_date(form: Format) -> None:
    case = Case(form)
    points = case.sweep.zero_points.clone()
    case.polish(3)
    error = case.sweep.weights.double() - case.restored()
    torch.testing.assert_close(case.sweep.error.double(), error, rtol=1e-4, atol=1e-6)
    assert torch.equal(case.sweep.zero_points, points)
    assert torch.equal(case.sweep.scales.half().float(), case.sweep.scales)


def exhaustive_round(case: Case) -> tuple[Tensor, Tensor]:
    """One round by trying every code of every column, then every fp16 scale near the old one; (codes, scales)."""
    sweep, hessian, form = case.sweep, case.damped, case.form
    codes, scales = sweep.codes.double(), sweep.scales.double()
    points = case.spread(sweep.zero_points).double()
    choices = torch.arange(2**form.bits, dtype=torch.float64)
    # Consecutive bit patterns are consecutive fp16 values of one sign.
    nearby = torch.arange(-300, 301, dtype=torch.int16)

    def cost(values: Tensor) -> Tensor:
        """Of candidates for one row, [candidates, K]."""
        error = sweep.weights[:, row].double() - values
        return ((error @ hessian) * error).sum(1)

    for row in range(codes.shape[1]):
        for group, (start, stop) in enumerate(case.order.bounds):
            for column in range(start, stop):
                candidates = codes[:, row].repeat(len(choices), 1)
                candidates[:, column] = choices
                spread = case.spread(scales)[:, row]
                codes[column, row] = choices[cost((candidates - points[:, row]) * spread).argmin()]
            pattern = scales[group, row].half().view(torch.int16)
            tried = (pattern + nearby).view(torch.float16).double()
            candidates = ((codes[:, row] - points[:, row]) * case.spread(scales)[:, row]).repeat(len(tried), 1)
            candidates[:, start:stop] = (codes[start:stop, row] - points[start:stop, row]) * tried[:, None]
            scales[group, row] = tried[cost(candidates).argmin()]
    return codes, scales


@pytest.mark.parametrize("form", FORMS[:2], ids=lambda form: form.label)
def test_a_round_finds_what_trying_everything_finds(form: Format) -> None:
    case = Case(form, size=40, rows=6)
    codes, scales = exhaustive_round(case)
    case.polish(1)
    assert torch.equal(case.sweep.codes.double(), codes)
    # Two neighbouring fp16 values can be equally good in single precision.
    torch.testing.assert_close(case.sweep.scales.double(), scales, rtol=2.0**-10, atol=0)
    assert (case.sweep.scales.double() == scales).double().mean() > 0.8


def test_nothing_changes_where_nothing_can_improve() -> None:
    case = Case(FORMS[0])
    case.polish(50)
    codes, scales, best = case.sweep.codes.clone(), case.sweep.scales.clone(), case.objective()
    case.polish(1)
    assert case.objective() == pytest.approx(best, rel=1e-5)
    assert (case.sweep.codes != codes).float().mean() < 0.01
    assert (case.sweep.scales != scales).float().mean() < 0.1


def test_no_rounds_change_nothing() -> None:
    case = Case(FORMS[0])
    codes, error = case.sweep.codes.clone(), case.sweep.error.clone()
    case.polish(0)
    assert torch.equal(case.sweep.codes, codes) and torch.equal(case.sweep.error, error)
