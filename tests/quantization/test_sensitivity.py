"""Losses of every group: against the whole model computed plainly, and the same after an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest
import torch
from test_allocation import mixed
from tiny import MEMORY, Model
from torch import Tensor

from glmexport.architecture.description import DecoderLayer
from glmexport.formats.nearest import round_to_nearest
from glmexport.foundation.errors import MachineError
from glmexport.foundation.progress import Silent
from glmexport.quantization.allocation import EMBEDDING_TAP, probe_bytes, tie_groups
from glmexport.quantization.deviation import Outputs, of_head, of_states, of_states_and_head
from glmexport.quantization.memory import MemoryPlan, plan_memory
from glmexport.quantization.sensitivity import Probe, probe_ids
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.reference import Block, Reference
from glmexport.validation.divergence import kl_divergence

RECIPE = mixed(4.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


def probe_of(model: Model, directory: Path, memory: MemoryPlan = MEMORY) -> Probe:
    reference = Reference(model.checkpoint, model.architecture)
    ids = probe_ids(model.calibration, 256)
    groups = list(tie_groups(model.architecture, RECIPE))
    return Probe(reference, ids, model.calibration.prefix, groups, WorkDirectory(directory, {}), memory)


@pytest.fixture(scope="module")
def losses(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    return probe_of(model, tmp_path_factory.mktemp("probe")).losses(Silent())


class Plain:
    """The whole model in one go, with some of its matrices replaced."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.reference = Reference(model.checkpoint, model.architecture)
        self.ids = probe_ids(model.calibration, 256)
        self.original = self.log_probabilities({})

    def log_probabilities(self, replaced: dict[str, Tensor]) -> Tensor:
        model, positions = self.model, self.reference.position_embeddings(self.ids.shape[1])
        key, head = model.architecture.embedding, model.architecture.lm_head.weight
        hidden = replaced.get(key, model.checkpoint.read(key))[self.ids]
        for layer in model.architecture.layers:
            hidden = self.reference.block(layer, replaced.get).forward(hidden, positions)
        logits = self.reference.final_norm(hidden) @ replaced.get(head, model.checkpoint.read(head)).T
        return logits[:, model.calibration.prefix :].double().log_softmax(-1)

    def loss(self, replaced: dict[str, Tensor]) -> float:
        return float(kl_divergence(self.original, self.log_probabilities(replaced)).mean())


def test_a_loss_is_the_kl_of_that_group_alone(model: Model, losses: list[list[float]]) -> None:
    """At 8 bits every column counts the same, which makes the rounding plain."""
    plain = Plain(model)
    for group, row in zip(tie_groups(model.architecture, RECIPE), losses, strict=True):
        (candidate,) = (index for index, form in enumerate(group.candidates) if form.bits == 8)
        form = group.candidates[candidate]
        expected = plain.loss(
            {key: round_to_nearest(model.checkpoint.read(key), form).dequantize() for key in group.shapes}
        )
        assert row[candidate] == pytest.approx(expected, rel=0.02), group.name
        assert all(worse > row[candidate] for at, worse in enumerate(row) if at != candidate), group.name


def test_a_format_that_is_not_tried_follows_from_one_that_is(model: Model, losses: list[list[float]]) -> None:
    """Groups of 64 from groups of 32, both with the grids that the probe uses; chance errors of so small a model
    are large in one group of matrices and cancel over all."""
    plain, ratios = Plain(model), []
    positions = plain.reference.position_embeddings(plain.ids.shape[1])
    hidden = plain.reference.embed(plain.ids)
    groups = list(tie_groups(model.architecture, RECIPE))
    for layer in model.architecture.layers:
        block = plain.reference.block(layer)
        for number in (index for index, group in enumerate(groups) if group.layer == layer.index):
            inputs = block.tap(groups[number].tap, hidden, positions)[:, model.calibration.prefix :]
            importance = inputs.square().mean((0, 1))
            followed, tried = (
                plain.loss(
                    {
                        key: round_to_nearest(model.checkpoint.read(key), form, importance).dequantize()
                        for key in groups[number].shapes
                    }
                )
                for form in groups[number].candidates[1:3]
            )
            assert losses[number][2] == pytest.approx(tried, rel=1e-3)
            ratios.append(losses[number][1] / followed)
        hidden = block.forward(hidden, positions)
    assert geometric_mean(ratios) == pytest.approx(1, abs=0.15)
    assert max(ratios) < 2 and min(ratios) > 0.5


def test_the_disk_that_trials_take(model: Model, tmp_path: Path) -> None:
    """Twice what lies there after the last block, with room for the trials of the head, which leave nothing there."""
    probe = probe_of(model, tmp_path)
    probe._embedding()
    for index, layer in enumerate(model.architecture.layers, 1):
        probe._block(index, layer)
    (trials,) = tmp_path.glob("*.trials.activations")
    (original,) = tmp_path.glob("*.original.activations")
    head = 3 * original.stat().st_size
    assert 2 * (trials.stat().st_size + original.stat().st_size + head) == probe_bytes(model.architecture, RECIPE)


def test_a_tied_head_changes_with_the_embedding(tmp_path: Path) -> None:
    model = Model(tmp_path / "model", tie_word_embeddings=True)
    found = probe_of(model, tmp_path / "probe").losses(Silent())
    group = next(iter(tie_groups(model.architecture, RECIPE)))
    assert group.tap == EMBEDDING_TAP
    rounded = round_to_nearest(model.checkpoint.read(model.architecture.embedding), group.candidates[3])
    assert found[0][3] == pytest.approx(
        Plain(model).loss({model.architecture.embedding: rounded.dequantize()}), rel=0.02
    )


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 10.0])
def test_divergences_against_whole_rows_of_logits(model: Model, scale: float) -> None:
    reference = Reference(model.checkpoint, model.architecture)
    chance = torch.Generator().manual_seed(7)
    head = model.checkpoint.read(model.architecture.lm_head.weight)
    normed = 20 * torch.randn(300, head.shape[1], generator=chance)
    states = normed + scale * torch.randn(normed.shape, generator=chance)
    factor = 1 + scale * 0.1
    # Slabs that do not divide the vocabulary.
    outputs = Outputs(reference, normed, 100)
    changes = [
        of_states(outputs, states),
        of_head(outputs, lambda slab: slab * factor),
        of_states_and_head(outputs, states, lambda slab: slab * factor),
    ]

    def naive(inputs: Tensor, matrix: Tensor) -> float:
        original = (normed.double() @ head.double().T).log_softmax(-1)
        return float(kl_divergence(original, (inputs.double() @ matrix.double().T).log_softmax(-1)).mean())

    expected = [naive(states, head), naive(normed, head * factor), naive(states, head * factor)]
    assert outputs.divergences(changes) == pytest.approx(expected, rel=2e-3)
    assert outputs.divergences([of_states(outputs, normed)]) == [0.0]


def test_a_model_that_is_broken_beyond_fp32_still_has_a_loss(model: Model) -> None:
    reference = Reference(model.checkpoint, model.architecture)
    normed = torch.randn(5, model.architecture.hidden_size)
    outputs = Outputs(reference, normed, 100)
    (loss,) = outputs.divergences([of_states(outputs, 1e5 * normed)])
    assert 10 < loss < float("inf")


@pytest.mark.parametrize("block", [0, 1])
def test_a_killed_pass_goes_on_after_its_last_block(
    model: Model, losses: list[list[float]], tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the trials of ``block`` are written."""
    first = probe_of(model, tmp_path)
    through = first._through

    def cut(inside: Block, *arguments: Any) -> Iterator[Tensor]:
        yield from through(inside, *arguments)
        if inside.layer.index == block:
            raise KeyboardInterrupt

    monkeypatch.setattr(first, "_through", cut)
    with pytest.raises(KeyboardInterrupt):
        first.losses(Silent())
    progress, again = Silent(), probe_of(model, tmp_path)
    done: list[int] = []
    step = again._block

    def noted(index: int, layer: DecoderLayer) -> None:
        done.append(layer.index)
        step(index, layer)

    monkeypatch.setattr(again, "_block", noted)
    assert again.losses(progress) == losses
    assert done == list(range(block, 2))
    assert any("Resuming" in remark for remark in progress.remarks)
    again.forget()
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".partial")] == ["job.json"]


def test_the_plan_covers_the_trials(model: Model) -> None:
    """With as many positions that they, and not the solver, are the most there is."""
    assert RECIPE.budget is not None
    long = RECIPE.model_copy(update={"budget": RECIPE.budget.model_copy(update={"probe_tokens": 1 << 21})})
    states = (1 << 21) * model.architecture.hidden_size * 4
    plan = plan_memory(model.architecture, long)
    assert plan.peak_bytes > plan_memory(model.architecture, RECIPE).peak_bytes
    assert plan.peak_bytes > 4 * states
    smaller = plan_memory(model.architecture, long, plan.peak_bytes - 1)
    assert smaller.batch_tokens < plan.batch_tokens and smaller.chunk_weights < plan.chunk_weights
    with pytest.raises(MachineError):
        plan_memory(model.architecture, long, 3 * states)


def test_smaller_batches_measure_the_same(model: Model, losses: list[list[float]], tmp_path: Path) -> None:
    probe = probe_of(model, tmp_path, MemoryPlan(batch_tokens=64, chunk_weights=64 * 64, peak_bytes=0))
    whole = probe_of(model, tmp_path / "whole", MemoryPlan(batch_tokens=4096, chunk_weights=1 << 25, peak_bytes=0))
    assert (probe._batch, whole._batch) == (1, 64)
    for found, more, row in zip(probe.losses(Silent()), whole.losses(Silent()), losses, strict=True):
        assert found == pytest.approx(row, rel=1e-3)
        assert more == pytest.approx(row, rel=1e-3)
