"""GPTQ against the textbook, against round-to-nearest, and on Hessians that real text produces and nobody wants."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import EVERY_FORM, correlated, generator, output_error, relative_error, row_errors, weights
from torch import Tensor

from glmexport.formats.codecs import codec_of
from glmexport.formats.grid import decode, encode, minmax_grid
from glmexport.formats.nearest import round_to_nearest
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format, Solver
from glmexport.quantization import solve as solving
from glmexport.quantization.problem import Problem
from glmexport.quantization.solve import Solution, gptq

W4G32 = Format(bits=4, group_size=32)
DEFAULT = Solver()
PLAIN = Solver(order="stored", scale_search=False, polish_rounds=0)
form_cases = pytest.mark.parametrize("form", EVERY_FORM, ids=lambda form: form.label)


def solve(weight: Tensor, hessian: Tensor, form: Format, solver: Solver = DEFAULT, chunk: int = 1 << 20) -> Solution:
    return gptq(weight.split(chunk), Problem.prepare(hessian, form, solver), form, solver)


def same(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.dequantize(), other.dequantize())


def importance(hessian: Tensor) -> Tensor:
    """The diagonal, with the mean of what lives where nothing does."""
    diagonal = hessian.diagonal()
    alive = diagonal.isfinite() & (diagonal > 0)
    return torch.where(alive, diagonal, diagonal[alive].mean())


def textbook(weight: Tensor, hessian: Tensor, form: Format, damping: float) -> tuple[Tensor, Tensor]:
    """Codes and matrix of GPTQ as published: round a column, move the others along the inverse, drop the column."""
    moving, size = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(size)
    inverse = torch.linalg.inv(damped)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for column in range(size):
        if column % form.group_size == 0:
            entered = moving[:, column : column + form.group_size]
            scale, zero_point = minmax_grid(entered.T.float(), form)
        code = encode(moving[:, column], scale.double(), zero_point.double(), form.bits)
        codes[:, column] = code.to(torch.uint8)
        error = (moving[:, column] - decode(code, scale.double(), zero_point.double())) / inverse[0, 0]
        moving[:, column:] -= torch.outer(error, inverse[0])
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return codes, moving


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [32, 56, 64])
@pytest.mark.parametrize("form", [form for form in EVERY_FORM if form.group_size <= 32], ids=lambda form: form.label)
def test_the_plain_solver_is_the_textbook(form: Format, size: int, seed: int) -> None:
    weight, hessian = weights(12, size, seed), correlated(size, seed)
    solution = solve(weight, hessian, form, PLAIN)
    codes, restored = textbook(weight, hessian, form, PLAIN.damping)
    # What the solver adds to it: rows that rounding to nearest serves better are rounded so.
    nearest = round_to_nearest(weight, form)
    damped = hessian + PLAIN.damping * hessian.diagonal().mean() * torch.eye(size)
    better = row_errors(weight - nearest.dequantize(), damped) < row_errors(weight - restored, damped)
    # Of two ways to the same codes, rounding decides which is the smaller error.
    better &= (nearest.codes != codes).any(1)
    assert solution.nearest_rows == int(better.sum())
    codes = torch.where(better[:, None], nearest.codes, codes)
    restored = torch.where(better[:, None], nearest.dequantize().double(), restored)
    # A code may fall to the other side of a tie in single precision, and then takes later ones along in its row.
    alike = (solution.linear.codes == codes).all(1)
    assert alike.float().mean() >= 0.9
    torch.testing.assert_close(solution.linear.dequantize()[alike].double(), restored[alike], rtol=1e-5, atol=1e-7)
    found = output_error((weight - solution.linear.dequantize())[alike], hessian)
    assert found == pytest.approx(output_error((weight - restored)[alike], hessian), rel=1e-5)


@form_cases
def test_much_better_than_round_to_nearest_on_correlated_inputs(form: Format) -> None:
    weight, hessian = weights(24, 256), correlated(256)
    for solver in (PLAIN, DEFAULT):
        solution = solve(weight, hessian, form, solver)
        nearest = relative_error(weight, round_to_nearest(weight, form), hessian)
        assert relative_error(weight, solution.linear, hessian) < 0.7 * nearest
        assert solution.linear.form == form


@form_cases
def test_equal_to_round_to_nearest_on_independent_inputs(form: Format) -> None:
    weight, hessian = weights(16, 256, 5), torch.eye(256) * 3
    for order in ("stored", "group"):
        solver = PLAIN.model_copy(update={"order": order})
        assert same(solve(weight, hessian, form, solver).linear, round_to_nearest(weight, form))
    searched = round_to_nearest(weight, form, torch.ones(256))
    unpolished = DEFAULT.model_copy(update={"polish_rounds": 0})
    found = relative_error(weight, solve(weight, hessian, form, unpolished).linear, hessian)
    assert found == pytest.approx(relative_error(weight, searched, hessian), rel=0.02)


@pytest.mark.parametrize("form", [W4G32, Format(bits=4, group_size=128, symmetric=True)], ids=lambda form: form.label)
@pytest.mark.parametrize("ingredient", ["order", "scale_search", "polish_rounds"])
@pytest.mark.parametrize("others", ["without", "with"])
def test_each_ingredient_earns_its_place(form: Format, ingredient: str, others: str) -> None:
    """Averaged over seeds, adding it to the plain solver or to all the others makes the error no larger."""
    added = {ingredient: getattr(DEFAULT, ingredient)}
    with_it = PLAIN.model_copy(update=added) if others == "without" else DEFAULT
    without = with_it.model_copy(update={ingredient: getattr(PLAIN, ingredient)})
    ratios = []
    for seed in range(6):
        weight, hessian = weights(16, 256, seed), correlated(256, seed)
        # Channels of very different size, as models have them: what an order can make use of.
        size = torch.exp(torch.randn(256, generator=generator(seed)) * 0.7)
        hessian = hessian * size * size[:, None]
        errors = [relative_error(weight, solve(weight, hessian, form, s).linear, hessian) for s in (with_it, without)]
        ratios.append(math.log(errors[0] / errors[1]))
    assert sum(ratios) / len(ratios) <= 0.01


@pytest.mark.parametrize("solver", [PLAIN, DEFAULT], ids=["plain", "default"])
def test_rows_do_not_depend_on_how_they_are_chunked(solver: Solver) -> None:
    weight, hessian = weights(160, 96), correlated(96)
    whole = solve(weight, hessian, W4G32, solver)
    for chunk in (64, 80, 159):
        parts = solve(weight, hessian, W4G32, solver, chunk)
        assert same(parts.linear, whole.linear)
        assert parts.relative_error == pytest.approx(whole.relative_error, rel=1e-5)
        assert parts.round_to_nearest_error == pytest.approx(whole.round_to_nearest_error, rel=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_dead_column_keeps_its_nearest_weight(symmetric: bool) -> None:
    """Text that was not calibrated on may reach it."""
    form = Format(bits=4, group_size=32, symmetric=symmetric)
    dead = torch.tensor([0, 17, 40, 41, 95])
    weight, hessian = weights(20, 96), correlated(96)
    hessian[dead], hessian[:, dead] = 0, 0
    solution = solve(weight, hessian, form, PLAIN)
    assert solution.dead_columns == len(dead) and solution.fallback is None
    scales = solution.linear.scales.float().repeat_interleave(32, 1)[:, dead]
    error = (solution.linear.dequantize() - weight)[:, dead].abs()
    # Half a step; a little more where rounding the scale to fp16 or the range to full codes cut off an end.
    assert bool((error <= 0.501 * scales.abs()).float().mean() > 0.95)
    assert bool((error <= 1.01 * scales.abs()).all())
    default = solve(weight, hessian, form).linear.dequantize()[:, dead]
    assert default.abs().mean() > 0.5 * weight[:, dead].abs().mean()
    assert bool(((default - weight[:, dead]).abs() <= 2 * scales.abs()).all())


def test_dead_columns_do_not_change_the_others() -> None:
    """Columns 32 to 63 never saw an input: the rest is solved as if they were not there."""
    weight, hessian = weights(20, 96), correlated(96)
    hessian[32:64], hessian[:, 32:64] = 0, 0
    alive = [*range(32), *range(64, 96)]
    whole = solve(weight, hessian, W4G32, PLAIN).linear.dequantize()[:, alive]
    alone = solve(weight[:, alive], hessian[alive][:, alive], W4G32, PLAIN).linear.dequantize()
    assert (whole != alone).float().mean() < 0.01


def test_no_input_at_all() -> None:
    weight = weights(8, 64)
    solution = solve(weight, torch.zeros(64, 64), W4G32, PLAIN)
    assert solution.dead_columns == 64
    assert solution.relative_error == 0
    assert same(solution.linear, round_to_nearest(weight, W4G32))


@pytest.mark.parametrize("rank", [1, 4])
def test_few_different_inputs_are_enough(rank: int) -> None:
    random = generator(rank)
    inputs = torch.randn(rank, 128, generator=random)
    weight, hessian = weights(24, 128), inputs.T @ inputs / rank
    solution = solve(weight, hessian, W4G32)
    assert solution.fallback is None
    assert solution.damping >= DEFAULT.damping
    assert bool(solution.linear.dequantize().isfinite().all())
    assert relative_error(weight, solution.linear, hessian) < 0.2 * solution.round_to_nearest_error


def test_two_columns_that_are_always_equal() -> None:
    hessian = correlated(64)
    hessian[1], hessian[:, 1] = hessian[0], hessian[:, 0]
    hessian[1, 1] = hessian[0, 1] = hessian[1, 0] = hessian[0, 0]
    solution = solve(weights(8, 64), hessian, W4G32)
    assert solution.fallback is None
    assert solution.relative_error < solution.round_to_nearest_error


def test_damping_rises_until_the_hessian_can_be_factored_and_is_reported() -> None:
    values, vectors = torch.linalg.eigh(correlated(64).double())
    values[0] = -0.05 * values.mean()
    hessian = ((vectors * values) @ vectors.T).float()
    solution = solve(weights(8, 64), hessian, W4G32)
    assert solution.damping == pytest.approx(0.1)
    assert solution.fallback == "the Hessian needed damping 0.1 instead of 0.01"
    assert 0 < solution.relative_error < solution.round_to_nearest_error


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e6])
@pytest.mark.parametrize("place", [(5, 5), (5, 9)])
def test_a_hessian_that_cannot_be_factored_is_said_to_be_so(value: float, place: tuple[int, int]) -> None:
    weight, hessian = weights(80, 64), correlated(64)
    hessian *= torch.linspace(0.1, 3, 64) * torch.linspace(0.1, 3, 64)[:, None]
    hessian[place] = hessian[place[::-1]] = value
    if value == -1e6 and place == (5, 5):
        hessian[5, 5] = 0  # a column whose sum of squares is zero cannot go with others
        hessian[5, 6] = hessian[6, 5] = -1e6
    solution = solve(weight, hessian, W4G32, chunk=32)
    assert solution.fallback == "the Hessian could not be factored: rounded to nearest"
    assert same(solution.linear, round_to_nearest(weight, W4G32, importance(hessian)))
    assert solution.nearest_rows == 80
    assert math.isnan(solution.relative_error) and math.isnan(solution.round_to_nearest_error)


@form_cases
@pytest.mark.parametrize("solver", [PLAIN, DEFAULT], ids=["plain", "default"])
def test_reported_errors_are_those_of_the_stored_matrix(form: Format, solver: Solver) -> None:
    """Recomputed from the dequantized matrix and the Hessian as measured, without damping or fill."""
    weight, hessian = weights(20, 200, 7), correlated(200, 7, noise=0.5)
    hessian[[3, 77]], hessian[:, [3, 77]] = 0, 0
    solution = solve(weight, hessian, form, solver, chunk=13)
    assert solution.relative_error == pytest.approx(relative_error(weight, solution.linear, hessian), rel=1e-3)
    searched = importance(hessian) if solver.scale_search else None
    nearest = relative_error(weight, round_to_nearest(weight, form, searched), hessian)
    assert solution.round_to_nearest_error == pytest.approx(nearest, rel=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_outliers_and_one_repeated_token(symmetric: bool, seed: int) -> None:
    form = Format(bits=4, group_size=32, symmetric=symmetric)
    random = generator(seed)
    weight = weights(32, 128, seed)
    weight[torch.rand(weight.shape, generator=random) < 0.01] *= 1000
    token = torch.randn(128, generator=random)
    hessian = torch.outer(token, token)
    solution = solve(weight, hessian, form)
    nearest = round_to_nearest(weight, form)
    assert relative_error(weight, solution.linear, hessian) <= relative_error(weight, nearest, hessian)


@form_cases
def test_a_last_group_that_is_not_full(form: Format) -> None:
    weight, hessian = weights(12, 200), correlated(200)
    for solver in (PLAIN, DEFAULT):
        solution = solve(weight, hessian, form, solver)
        assert solution.linear.codes.shape == (12, 200)
        assert solution.linear.scales.shape == (12, -(-200 // form.group_size))
        assert solution.relative_error < solution.round_to_nearest_error


@form_cases
def test_round_to_nearest_takes_the_nearest_code(form: Format) -> None:
    weight = weights(6, 200)
    for importance in (None, torch.rand(200, generator=generator(8))):
        linear = round_to_nearest(weight, form, importance)
        chosen = (linear.dequantize() - weight).abs()
        for step in (-1, 1):
            shifted = (linear.codes.int() + step).clamp(0, 2**form.bits - 1).to(torch.uint8)
            other = QuantizedLinear(form, shifted, linear.scales, linear.zero_points).dequantize()
            assert bool((chosen <= (other - weight).abs() + 1e-7).all())


def test_the_inputs_are_left_as_they_were() -> None:
    weight, hessian = weights(8, 64), correlated(64)
    before = weight.clone(), hessian.clone()
    solve(weight, hessian, W4G32)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@form_cases
def test_what_a_sweep_leaves_is_added_up_on_the_way(form: Format) -> None:
    weight, hessian = weights(20, 200, 3), correlated(200, 3)
    problem = Problem.prepare(hessian, form, DEFAULT)
    assert problem.factor is not None
    sweep = solving.start_sweep(weight, problem.order)
    cost = solving.round_columns(sweep, problem.factor, problem.order, codec_of(form), DEFAULT)
    damped = hessian + DEFAULT.damping * hessian.diagonal().mean() * torch.eye(200)
    damped = damped[problem.order.columns][:, problem.order.columns]
    torch.testing.assert_close(cost.double(), row_errors(sweep.error.T, damped), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("size", [96, 700])
def test_what_costs_more_is_found_without_adding_up_everything(size: int) -> None:
    hessian = correlated(size)
    problem = Problem.prepare(hessian, W4G32, DEFAULT)
    assert problem.factor is not None
    columns = weights(50, size).T[problem.order.columns]
    damped = hessian + DEFAULT.damping * hessian.diagonal().mean() * torch.eye(size)
    damped = damped[problem.order.columns][:, problem.order.columns]
    whole = row_errors(columns.T, damped)
    for share in (0.01, 0.5, 0.99, 1.01, 2.0):
        # Half of the rows have a limit that they do not reach at any share.
        limit = (whole * share).float()
        limit[::2] = whole[::2].float() * 3
        reached = solving.reaches(problem.factor, columns, limit)
        assert torch.equal(reached, whole >= limit.double())


def test_errors_of_a_wide_matrix_are_told_of_some_of_its_rows() -> None:
    weight, hessian = weights(64, 1024), correlated(1024)
    form = Format(bits=4, group_size=128)
    solution = solve(weight, hessian, form, chunk=25)
    told = weight[::2]
    quantized = QuantizedLinear(
        form, solution.linear.codes[::2], solution.linear.scales[::2], solution.linear.zero_points[::2]
    )
    assert solution.relative_error == pytest.approx(relative_error(told, quantized, hessian), rel=1e-3)
    everywhere = relative_error(weight, solution.linear, hessian)
    assert solution.relative_error != pytest.approx(everywhere, rel=1e-6)
    assert solution.relative_error == pytest.approx(everywhere, rel=0.1)
