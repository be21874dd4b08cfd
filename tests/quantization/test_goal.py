"""The asymmetric target: least squares by hand, its shrinkage on text it has not seen, and what it buys."""

from __future__ import annotations

import pytest
import torch
from matrices import generator
from torch import Tensor

from glmexport.formats.nearest import round_to_nearest
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format, Solver
from glmexport.quantization.goal import Goal, Sample, shrinkage, stream_difference
from glmexport.quantization.problem import Problem
from glmexport.quantization.solve import gptq

K, N = 48, 20
W4G16 = Format(bits=4, group_size=16)


class Tap:
    """Inputs of the original and, with errors that depend on them, of the quantized stream."""

    def __init__(self, tokens: int, seed: int = 0, *, learnable: bool = True) -> None:
        random = generator(seed)
        mix = torch.randn(K, K, generator=generator(99)) / K**0.5
        self.original = torch.randn(tokens, K, generator=random) @ mix
        bend = 0.2 * torch.randn(K, K, generator=generator(98)) / K**0.5
        noise = 0.05 * torch.randn(tokens, K, generator=random)
        self.quantized = self.original + (self.original @ bend if learnable else 0) + noise
        self.weight = torch.randn(N, K, generator=generator(97))

    @property
    def difference(self) -> Tensor:
        return (self.original - self.quantized) @ self.weight.T

    @property
    def hessian(self) -> Tensor:
        return self.quantized.T @ self.quantized / len(self.quantized)

    def goal(self, held: Tap) -> Goal:
        return Goal(self.difference.T @ self.quantized / len(self.quantized), held.difference, of_inputs=False)

    def goal_of_inputs(self, held: Tap) -> Goal:
        cross = (self.original - self.quantized).T @ self.quantized / len(self.quantized)
        return Goal(cross, held.original - held.quantized, of_inputs=True)

    def sample(self) -> Sample:
        return Sample(self.quantized, torch.full((len(self.quantized),), 1 / len(self.quantized)))

    def error(self, weight: Tensor) -> float:
        """Of ``weight`` on the quantized stream, against the original's output, relative."""
        wanted = self.original @ self.weight.T
        return float((self.quantized @ weight.T - wanted).square().sum() / wanted.square().sum())


def solve(tap: Tap, held: Tap | None, goal: Goal | None, **solver: object) -> tuple[Tensor, float | None]:
    settings = Solver.model_validate(solver)
    problem = Problem.prepare(tap.hessian, W4G16, settings, held.sample() if held else None)
    solution = gptq([tap.weight[:7], tap.weight[7:]], problem, W4G16, settings, problem.correction(goal))
    return solution.linear.dequantize(), solution.shrinkage


def test_shrinkage_by_hand() -> None:
    predicted = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    difference = torch.tensor([[0.5, 3.0, -1.0, 1.0], [0.5, 3.0, -2.0, 1.0]])
    factors = shrinkage(difference, predicted, torch.tensor([0.5, 0.5]))
    assert factors.tolist() == [0.5, 1.0, 0.0, 0.0]
    # Weights decide between texts that disagree: (3 * 1 + 1 * 0) / 4.
    disagreeing = torch.tensor([[1.0], [0.0]])
    assert float(shrinkage(disagreeing, torch.ones(2, 1), torch.tensor([3.0, 1.0]))) == pytest.approx(0.75)


def test_the_difference_of_the_stream_without_a_norm() -> None:
    ours, theirs = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, -1.0]])
    assert stream_difference(torch.zeros(1, 2), ours, theirs, None, 0.0).tolist() == [[0.5, -3.0]]


def test_the_difference_of_the_stream_in_front_of_a_norm() -> None:
    """ours + norm(y + d) is theirs + norm(y), up to what d does to the rms itself."""
    random = generator(3)
    branch = torch.randn(4, 512, generator=random)
    gain = torch.rand(512, generator=random) + 0.5
    ours = torch.randn(4, 512, generator=random)
    theirs = ours + 0.01 * torch.randn(4, 512, generator=random)

    def norm(y: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    moved = branch + stream_difference(branch, ours, theirs, gain, 1e-5)
    left = (ours + norm(moved) - theirs - norm(branch)).norm() / (theirs - ours).norm()
    assert left < 0.1
    # A channel that the norm mutes could only be moved by a huge output.
    gain[7] = 0.0
    assert bool((stream_difference(branch, ours, theirs, gain, 1e-5)[:, 7] == 0).all())


@pytest.mark.parametrize("of_inputs", [False, True])
def test_the_goal_is_the_least_squares_fit_to_the_original_s_output(of_inputs: bool) -> None:
    """At 8 bits what is left of the error is what no matrix could take back."""
    tap, held = Tap(4000), Tap(4000, 1)
    goal = tap.goal_of_inputs(held) if of_inputs else tap.goal(held)
    form, solver = Format(bits=8, group_size=16), Solver(damping=1e-6)
    problem = Problem.prepare(tap.hessian, form, solver, held.sample())
    found = gptq([tap.weight[:7], tap.weight[7:]], problem, form, solver, problem.correction(goal))
    best = torch.linalg.lstsq(tap.quantized.double(), (tap.original @ tap.weight.T).double()).solution.T
    assert found.shrinkage == pytest.approx(1, abs=0.02)
    assert tap.error(found.linear.dequantize()) == pytest.approx(tap.error(best.float()), rel=0.02)
    assert tap.error(best.float()) < 0.3 * tap.error(tap.weight)


def test_both_forms_of_the_goal_give_the_same_matrix() -> None:
    tap, held = Tap(2000), Tap(500, 1)
    ours, theirs = (solve(tap, held, goal)[0] for goal in (tap.goal(held), tap.goal_of_inputs(held)))
    assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_gptq_with_the_goal_beats_gptq_without_on_new_text() -> None:
    tap, held, new = Tap(4000), Tap(1000, 1), Tap(4000, 2)
    own, none = solve(tap, held, None)
    aimed, kept = solve(tap, held, tap.goal(held))
    assert none is None and kept is not None and kept > 0.9
    assert new.error(aimed) < 0.4 * new.error(own)


def test_a_correction_that_is_chance_is_not_taken() -> None:
    """As many tokens as columns, and errors that do not depend on the input: the fit is nothing but chance."""
    tap, held, new = Tap(60, learnable=False), Tap(3000, 1, learnable=False), Tap(3000, 2, learnable=False)
    own, _ = solve(tap, held, None)
    aimed, kept = solve(tap, held, tap.goal(held))
    assert kept is not None and kept < 0.3
    assert new.error(aimed) < 1.05 * new.error(own)


def test_no_row_is_worse_on_held_out_text_than_before_polish_or_rounded_to_nearest() -> None:
    """Fitted to about as many tokens as columns, the solver follows them where no other text goes."""
    tap, held = Tap(40), Tap(3000, 1)
    solver, plain = Solver(damping=0.001, polish_rounds=4), Solver(damping=0.001, polish_rounds=0)
    sample = held.sample()
    guarded = gptq([tap.weight[:7], tap.weight[7:]], Problem.prepare(tap.hessian, W4G16, solver, sample), W4G16, solver)
    free = gptq([tap.weight], Problem.prepare(tap.hessian, W4G16, solver), W4G16, solver)
    swept = gptq([tap.weight], Problem.prepare(tap.hessian, W4G16, plain), W4G16, plain)
    # Judged by the text that they were fitted to, both always beat rounding to nearest.
    assert free.nearest_rows == swept.nearest_rows == 0

    def losses(linear: QuantizedLinear) -> Tensor:
        """Of every position and row, [S, N]."""
        return (sample.inputs @ (tap.weight - linear.dequantize()).T).double().square()

    nearest = losses(round_to_nearest(tap.weight, W4G16, tap.hessian.diagonal()))
    polished, unpolished = losses(free.linear), losses(swept.linear)
    taken_back = polished.mean(0) > unpolished.mean(0)
    assert guarded.unpolished_rows == int(taken_back.sum()) > 0
    solved = torch.where(taken_back, unpolished, polished)
    saved = solved - nearest
    replaced = saved.mean(0) > 3 * (saved.square().mean(0) / len(saved)).sqrt()
    assert 0 < guarded.nearest_rows == int(replaced.sum()) < N
    expected = torch.where(replaced, nearest, solved).mean(0)
    torch.testing.assert_close(losses(guarded.linear).mean(0), expected, rtol=1e-4, atol=0)
    assert expected.sum() < 0.9 * solved.mean(0).sum()


def test_rounding_to_nearest_is_held_against_the_goal_too() -> None:
    """It leaves the whole difference to the original, so a row that takes some of it back stays solved."""
    tap, held = Tap(120), Tap(3000, 1)
    problem = Problem.prepare(tap.hessian, W4G16, Solver(), held.sample())
    goal = tap.goal(held)
    found = gptq([tap.weight], problem, W4G16, Solver(), problem.correction(goal))
    nearest = round_to_nearest(tap.weight, W4G16, tap.hessian.diagonal())
    left = [
        held.sample().errors(held.difference + held.quantized @ (tap.weight - linear.dequantize()).T)
        for linear in (found.linear, nearest)
    ]
    assert found.nearest_rows == 0
    assert bool((left[0] < left[1]).all())
