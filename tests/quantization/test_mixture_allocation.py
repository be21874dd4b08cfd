"""Formats of a mixture's experts under a budget: within it, by coverage and error, and none lost for being cold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import MIXTURE
from test_allocation import mixed
from test_mixture_walk import mixture_model
from test_sensitivity import Plain, probe_of
from tiny import MEMORY, Model
from torch import Tensor

from glmexport.architecture.experts import EXPERT_INPUT, EXPERT_OUTPUT, MixtureOfExperts
from glmexport.formats.codecs import stored_bits
from glmexport.formats.nearest import round_to_nearest
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Format
from glmexport.quantization.allocation import (
    TieGroup,
    allocate,
    allowed_candidates,
    available_bits,
    count_trials,
    probe_bytes,
    tie_groups,
    tried_together,
)
from glmexport.quantization.decisions import ALLOCATION
from glmexport.quantization.expert_probe import ExpertProbe, coverage, share
from glmexport.quantization.memory import plan_memory
from glmexport.reference.reference import Block, Reference

EXPERTS = MIXTURE["n_routed_experts"]
RECIPE = mixed(4.5)
W2, W4, W8 = (Format(bits=bits, group_size=32) for bits in (2, 4, 8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return mixture_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def losses(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    return probe_of(model, tmp_path_factory.mktemp("probe")).losses(Silent())


def nearest(matrix: Tensor, form: Format, importance: Tensor) -> Tensor:
    """A rounding that weights all columns alike."""
    return round_to_nearest(matrix, form).dequantize()


class Routed:
    """The layer of experts, and what it reads at the probe text."""

    def __init__(self, model: Model) -> None:
        self.reference = Reference(model.checkpoint, model.architecture)
        self.layer = model.architecture.layers[1]
        assert isinstance(self.layer.mlp, MixtureOfExperts)
        self.mixture = self.layer.mlp
        self.block: Block = self.reference.block(self.layer)
        self.normed = torch.randn(300, model.architecture.hidden_size, generator=torch.Generator().manual_seed(1))
        self.counted = torch.ones(300, dtype=torch.bool)

    def probe(self, counted: Tensor | None = None) -> ExpertProbe:
        return ExpertProbe(self.reference, self.block, self.normed, self.counted if counted is None else counted)


def test_every_matrix_of_an_expert_has_a_format_of_its_own_and_those_alike_are_tried_together(model: Model) -> None:
    groups = list(tie_groups(model.architecture, RECIPE))
    assert {key for group in groups for key in group.shapes} == model.matrices()
    assert len({group.name for group in groups}) == len(groups)
    together = tried_together(groups)
    assert sorted(index for members in together for index in members) == list(range(len(groups)))
    several = [members for members in together if len(members) > 1]
    assert [len(members) for members in several] == [EXPERTS, EXPERTS]
    for members, part in zip(several, (EXPERT_INPUT, EXPERT_OUTPUT), strict=True):
        assert {groups[index].expert_part for index in members} == {part}
        assert groups[members[3]].name == f"block 1 {part} 3"
    # As many trials as a dense model of this depth has, and those of the experts: three numbers of bits of two parts.
    assert count_trials(model.architecture, RECIPE) == 3 * len(together)


def test_the_loss_of_experts_adds_up_to_what_they_cost_together(model: Model, losses: list[list[float]]) -> None:
    """At 8 bits every column counts the same, which makes the rounding plain."""
    plain, groups = Plain(model), list(tie_groups(model.architecture, RECIPE))
    for members in tried_together(groups):
        keys = [key for index in members for key in groups[index].shapes]
        rounded = {key: round_to_nearest(model.checkpoint.read(key), W8).dequantize() for key in keys}
        # A position on the edge between two experts may choose the other.
        found = sum(losses[index][3] for index in members)
        assert found == pytest.approx(plain.loss(rounded), rel=0.05), groups[members[0]].name
        for index in members:
            assert losses[index][3] > 0 and losses[index][0] > losses[index][2] > losses[index][3]


def test_a_trial_is_the_layer_with_all_experts_rounded(model: Model) -> None:
    routed = Routed(model)
    branch, rows = routed.layer.branches[1], routed.normed[None]
    found = routed.probe().trials([W2, W4], [1], nearest)
    output = routed.block.through(branch, rows)
    # The stream whose norm the rows are is not known: the mixture itself is what differs.
    module = routed.block.module.get_submodule("mlp")
    for part, matrix in ((EXPERT_INPUT, "gate_up"), (EXPERT_OUTPUT, "down")):
        replaced = {
            key: round_to_nearest(model.checkpoint.read(key), W4).dequantize()
            for key in (getattr(expert, matrix).weight for expert in routed.mixture.experts)
        }
        other = routed.reference.block(routed.layer, replaced.get).module.get_submodule("mlp")
        with torch.inference_mode():
            expected = (other(rows) - module(rows))[0]
        assert set(found.changes[part]) == {1}
        assert torch.allclose(found.changes[part][1], expected, atol=1e-5 * float(expected.abs().max()) + 1e-6)
    assert output.shape == rows.shape


def test_the_errors_are_coverage_times_the_mean_square_at_the_output(model: Model) -> None:
    """Computed plainly for one expert whose own positions are the whole pool, too."""
    routed = Routed(model)
    found = routed.probe().trials([W4], [], nearest)
    experts, weights = routed.block.route(routed.normed)
    square = weights.square() / weights.square().mean()
    pool = routed.normed[::3]
    masses = [float(square[experts == index].sum()) for index in range(EXPERTS)]
    for index in (0, 5, EXPERTS - 1):
        mlp = routed.mixture.experts[index]
        gate_up, down = (model.checkpoint.read(linear.weight) for linear in mlp.linears)
        difference = round_to_nearest(down, W4).dequantize() - down
        positions, slots = (experts == index).nonzero(as_tuple=True)
        others, theirs = (
            (routed.block.gated(rows @ gate_up.T) @ difference.T).square().sum(1)
            for rows in (pool, routed.normed[positions])
        )
        own = float((square[positions, slots] * theirs).sum())
        mean = (own + 16 * float(others.mean())) / (masses[index] + 16)
        expected = (masses[index] + 300 * 4 / EXPERTS) / 2 * mean
        assert found.errors[EXPERT_OUTPUT][index] == [pytest.approx(expected, rel=1e-3)]


def test_positions_that_do_not_count_change_the_layer_and_no_error(model: Model) -> None:
    routed = Routed(model)
    whole = routed.probe().trials([W4], [0], nearest)
    counted = routed.counted.clone()
    counted[:40] = False
    without = routed.probe(counted).trials([W4], [0], nearest)
    routed.normed, routed.counted = routed.normed[40:], routed.counted[40:]
    alone = routed.probe().trials([W4], [0], nearest)
    for part in (EXPERT_INPUT, EXPERT_OUTPUT):
        assert torch.allclose(without.changes[part][0], whole.changes[part][0], atol=1e-6)
        for first, second in zip(without.errors[part], alone.errors[part], strict=True):
            assert first == pytest.approx(second, rel=1e-4)


def test_an_expert_that_nothing_chose_counts_half_an_even_spread(model: Model) -> None:
    routed = Routed(model)
    # Every position is the same, and chooses the same four experts.
    routed.normed = routed.normed[:1].expand(300, -1).clone()
    chosen = set(routed.block.route(routed.normed)[0][0].tolist())
    found = routed.probe().trials([W2, W4], [], nearest)
    assert set(found.cold) == set(range(EXPERTS)) - chosen
    for rows in found.errors.values():
        assert all(row[0] > row[1] > 0 for row in rows)
    assert coverage(0, 75) == 37.5 and coverage(300, 75) == 187.5 and coverage(75, 75) == 75
    assert share([1.0, 3.0]) == [0.25, 0.75] and share([0.0, 0.0]) == [0.5, 0.5]


def test_experts_that_more_text_chooses_get_no_fewer_bits_at_equal_errors() -> None:
    masses = [0, 3, 10, 40, 80, 200, 500]
    mean = sum(masses) / len(masses)
    by_format, bits = (1.0, 0.09, 0.0005), (100, 180, 340)
    shares = [share([coverage(mass, mean) * error for mass in masses]) for error in by_format]
    losses = [[1e-3 * by_format[at] * shares[at][expert] for at in range(3)] for expert in range(len(masses))]
    for available in range(100 * len(masses), 341 * len(masses), 40):
        chosen = allocate(losses, [bits] * len(masses), available)
        assert chosen == sorted(chosen)


@pytest.mark.parametrize("bits_per_weight", [5.0, 6.5])
def test_a_mixed_walk_of_a_mixture_keeps_within_its_budget(
    model: Model, tmp_path: Path, bits_per_weight: float
) -> None:
    recipe = mixed(bits_per_weight)
    whole = model.walked(tmp_path, recipe)
    weights, shapes = whole.weights(), model.architecture.shapes()
    quantized = sum(stored_bits(shapes[key], weights.form(key)) for key in model.matrices())
    available = available_bits(model.architecture, recipe)
    assert 0.97 * available < quantized <= available
    record = whole.job.work.record(ALLOCATION)
    assert record is not None
    told = whole.allocation
    assert {key for group in told for key in group.keys} == model.matrices()
    assert sum(group.bits for group in told) == quantized
    for group in told:
        assert {weights.form(key) for key in group.keys} == {group.format}
    experts = [group for group in told if group.expert_part]
    assert len(experts) == 2 * EXPERTS and not any(group.tried for group in experts)
    assert len({group.format for group in experts}) > 1
    assert [number for number, group in enumerate(told) if group.cold] == sorted(record["note"]["cold"])


def test_a_killed_pass_knows_what_the_experts_cost(
    model: Model, losses: list[list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind the last block, whose experts are not read again."""
    first, again = probe_of(model, tmp_path), probe_of(model, tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(first, "_compare", killed)
    with pytest.raises(KeyboardInterrupt):
        first.losses(Silent())
    monkeypatch.setattr(again, "_block", killed)
    assert again.losses(Silent()) == losses
    assert again.cold == first.cold


def test_the_disk_and_the_memory_of_the_trials(model: Model, tmp_path: Path) -> None:
    probe = probe_of(model, tmp_path)
    probe._embedding()
    for index, layer in enumerate(model.architecture.layers, 1):
        probe._block(index, layer)
    (trials,) = tmp_path.glob("*.trials.activations")
    (original,) = tmp_path.glob("*.original.activations")
    assert trials.stat().st_size == len(probe._trials) * original.stat().st_size
    head = 3 * original.stat().st_size
    assert 2 * (trials.stat().st_size + original.stat().st_size + head) == probe_bytes(model.architecture, RECIPE)
    assert RECIPE.budget is not None
    long = RECIPE.model_copy(update={"budget": RECIPE.budget.model_copy(update={"probe_tokens": 1 << 21})})
    # The original's stream, its norm and the output, and the change of three formats of two parts.
    least = 10 * (1 << 21) * model.architecture.hidden_size * 4
    assert least < plan_memory(model.architecture, long, None).peak_bytes
    assert MEMORY.batch_tokens < 1 << 21


@pytest.mark.parametrize(("width", "spare", "expected"), [(2, 0, 2), (4, -1, 2), (4, 0, 4), (8, -1, 4), (8, 0, 8)])
def test_no_expert_has_fewer_bits_than_all_could_have(model: Model, width: int, spare: int, expected: int) -> None:
    """The budget is what all matrices take at a ``width``, and ``spare`` bits."""
    groups = list(tie_groups(model.architecture, RECIPE))
    available = sum(group.bits(_least(group, width)) for group in groups) + spare
    for group, allowed in zip(groups, allowed_candidates(groups, available), strict=True):
        forms = [group.candidates[index] for index in allowed]
        if group.expert_part:
            assert min(form.bits for form in forms) == expected
            assert forms == [form for form in group.candidates if form.bits >= expected]
        else:
            assert forms == list(group.candidates)


def _least(group: TieGroup, width: int) -> Format:
    """The smallest format of that many bits or more."""
    return min((form for form in group.candidates if form.bits >= width), key=group.bits)
