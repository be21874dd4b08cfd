"""The walk over a tiny model with random weights: everything committed, resumable, measured on what is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NEAREST, RECIPE, W4G32, W8G32, Model, digests
from torch import Tensor

from glmexport.formats.nearest import round_to_nearest
from glmexport.foundation.errors import MachineError
from glmexport.foundation.progress import Silent
from glmexport.quantization.memory import MemoryPlan, plan_memory
from glmexport.quantization.names import EMBEDDING, HEAD, block_step
from glmexport.quantization.problem import Problem
from glmexport.quantization.quantized_model import QuantizedModel
from glmexport.quantization.store import Activations, WorkDirectory
from glmexport.quantization.streams import Passage
from glmexport.reference.arithmetic import ROUTES, Route
from glmexport.reference.reference import Reference


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def walked(model: Model, tmp_path_factory: pytest.TempPathFactory) -> QuantizedModel:
    return model.walked(tmp_path_factory.mktemp("walked"))


def test_every_matrix_is_committed(model: Model, walked: QuantizedModel) -> None:
    assert walked.parts == (EMBEDDING, "block_000", "block_001", HEAD)
    assert block_step(1) == "block_001"
    committed = {key: form for step in walked.parts for key, form in walked.job.work.formats(step).items()}
    assert set(committed) == model.matrices()
    head, embedding = model.architecture.lm_head.weight, model.architecture.embedding
    assert all(form == (W8G32 if key in (head, embedding) else W4G32) for key, form in committed.items())
    # No activations and nothing half-written is left once the walk is through.
    assert sorted(digests(walked)) == sorted(f"{step}.safetensors" for step in ("folds", *walked.parts))


def test_what_the_walk_says_about_each_matrix(model: Model, walked: QuantizedModel) -> None:
    records, seconds = walked.records, walked.seconds
    assert seconds > 0
    assert walked.allocation == ()
    assert [record.key for record in records] == [
        model.architecture.embedding,
        *(linear.weight for _, linear in model.architecture.linears),
    ]
    for record in records[1:]:
        assert record.fallback is None and record.dead_columns == 0
        assert record.damping == RECIPE.solver.damping
        assert record.relative_error is not None and record.round_to_nearest_error is not None
        assert 0 < record.relative_error < record.round_to_nearest_error < 0.1
    qkv = next(record for record in records if record.part == "qkv")
    per_column = model.calibration.effective_tokens / model.architecture.hidden_size
    assert qkv.effective_tokens_per_column == pytest.approx(per_column)
    assert all(record.shrinkage is not None and 0 <= record.shrinkage <= 1 for record in records[1:])
    assert records[0].relative_error is None


def test_committed_matrices_are_near_the_checkpoint_s(model: Model, walked: QuantizedModel) -> None:
    weights = walked.weights()
    # The lm_head is fitted to the original's logits on a stream with 4-bit errors, not to itself.
    for key in model.matrices() - {model.architecture.lm_head.weight}:
        original, quantized = walked.job.checkpoint.read(key), weights.quantized(key).dequantize()
        form = weights.form(key)
        assert form is not None
        assert (original - quantized).norm() < (0.2 if form.bits == 4 else 0.02) * original.norm()


def test_the_embedding_is_rounded_to_nearest(model: Model, walked: QuantizedModel) -> None:
    key = model.architecture.embedding
    expected = round_to_nearest(model.checkpoint.read(key), W8G32)
    assert torch.equal(walked.job.work.linear(EMBEDDING, key).dequantize(), expected.dequantize())


@pytest.mark.parametrize("killed_after", [0, 1, 2, 3, 4])
def test_a_killed_walk_ends_where_an_uninterrupted_one_does(
    model: Model, walked: QuantizedModel, tmp_path: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model.walk(tmp_path)
    for index in range(killed_after):
        first.take_step(index)
    # What the kill interrupted: files of the next step that no record names.
    for name in ("block_001.partial", "block_001.quantized.activations.partial", "head.json.partial"):
        (tmp_path / name).write_bytes(b"half a fi")
    progress = Silent()
    second = model.walk(tmp_path, progress=progress)
    again: list[int] = []
    step = second.take_step

    def noted(index: int) -> None:
        again.append(index)
        step(index)

    monkeypatch.setattr(second, "take_step", noted)
    second.run()
    assert again == list(range(killed_after, 4))
    assert any("Resuming" in remark for remark in progress.remarks) == (killed_after > 0)
    found = {name: digest for name, digest in digests(second).items() if not name.endswith(".partial")}
    assert found == digests(walked)


@pytest.mark.parametrize("route", ROUTES.values(), ids=list(ROUTES))
def test_every_route_resumes_in_its_own_bytes(
    route: Route, model: Model, walked: QuantizedModel, tmp_path: Path
) -> None:
    with route.computing():
        whole = model.walked(tmp_path / "whole")
        first = model.walk(tmp_path / "killed")
        first.take_step(0)
        first.take_step(1)
        second = model.walk(tmp_path / "killed")
        second.run()
    assert digests(second) == digests(whole)
    # Behind the first code that falls otherwise, the walk of so small a model measures something else.
    first_errors = [
        [each.relative_error for each in found.records if (each.layer, each.part) == (0, "qkv")]
        for found in (whole, walked)
    ]
    assert len(first_errors[0]) == 3
    # A route that rounds computes here all the same; a command would refuse it.
    assert first_errors[0] == pytest.approx(first_errors[1], rel=0.02)


def test_a_kill_inside_a_step(
    model: Model, walked: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the second block's outputs are being written: its weights are there, and its record is not.

    The original's stream has left the scratch file by then.
    """
    walk = model.walk(tmp_path)
    assert walk.streams is not None
    outputs = Passage.outputs

    def interrupted(passage: Passage, *arguments: Any) -> dict[str, Iterator[Tensor] | Activations]:
        streams = outputs(passage, *arguments)
        if passage.layer.index != 1:
            return streams
        return {"original": streams["original"], "quantized": cut(streams["quantized"])}

    def cut(outputs: Iterator[Tensor] | Activations) -> Iterator[Tensor]:
        assert not isinstance(outputs, Activations)
        yield next(outputs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Passage, "outputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        walk.run()
    monkeypatch.undo()
    assert (tmp_path / "block_001.safetensors").is_file()
    assert walk.job.work.record("block_001") is None
    assert (tmp_path / "block_001.original.activations").is_file()
    second = model.walked(tmp_path)
    assert digests(second) == digests(walked)


@pytest.mark.parametrize("tap", [0, 1, 2, 3])
def test_a_kill_inside_a_block_loses_the_tap_under_way_alone(
    model: Model, walked: QuantizedModel, tmp_path: Path, tap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, prepare = WorkDirectory.commit, Problem.prepare

    def killed(self: WorkDirectory, step: str, *rest: Any, **more: Any) -> None:
        if step == f"block_001.tap_{tap}":
            raise KeyboardInterrupt
        commit(self, step, *rest, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(WorkDirectory, "commit", killed)
        model.walked(tmp_path)
    assert len(list(tmp_path.glob("block_001.tap_*.json"))) == tap
    assert not list(tmp_path.glob("block_000.tap_*"))
    solved: list[int] = []

    def counted(hessian: Tensor, *arguments: Any, **named: Any) -> Problem:
        solved.append(len(hessian))
        return prepare(hessian, *arguments, **named)

    monkeypatch.setattr("glmexport.quantization.quantizer.Problem.prepare", counted)
    second = model.walked(tmp_path)
    # The taps that are left of four, and the lm_head.
    assert len(solved) == 4 - tap + 1
    assert digests(second) == digests(walked)
    assert [record.model_dump() for record in second.records] == [record.model_dump() for record in walked.records]


def test_a_kill_between_a_commit_and_the_clean_up(
    model: Model, walked: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = model.walk(tmp_path)
    monkeypatch.setattr(walk.job.work, "drop_activations", lambda step: None)
    walk.take_step(0)
    walk.take_step(1)
    second = model.walked(tmp_path)
    found = digests(second)
    assert {name: digest for name, digest in found.items() if name in digests(walked)} == digests(walked)


def test_a_damaged_block_is_done_again(model: Model, walked: QuantizedModel, tmp_path: Path) -> None:
    """Its inputs are long gone, so the walk goes back as far as it must."""
    model.walked(tmp_path)
    path = tmp_path / "block_001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    second = model.walked(tmp_path)
    assert digests(second) == digests(walked)


def test_hessians_are_measured_behind_what_is_already_quantized(
    model: Model, walked: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Tensor] = []
    of = Problem.prepare

    def recorded(hessian: Tensor, *arguments: Any, **named: Any) -> Problem:
        # A copy: what becomes of the walk's own is its business.
        measured.append(hessian.clone())
        return of(hessian, *arguments, **named)

    monkeypatch.setattr("glmexport.quantization.quantizer.Problem.prepare", recorded)
    model.walked(tmp_path)
    monkeypatch.undo()

    expected = {quantized: naive_hessians(model, walked, quantized) for quantized in (True, False)}
    taps = [tap for layer in model.architecture.layers for tap in layer.taps]
    assert len(measured) == len(taps) + 1
    for index, found in enumerate(measured):
        behind, untouched = (expected[quantized][index] for quantized in (True, False))
        assert (found - behind).norm() < 1e-4 * behind.norm()
        assert (found - untouched).norm() > 1e-3 * untouched.norm()


def naive_hessians(model: Model, walked: QuantizedModel, quantized: bool) -> list[Tensor]:
    """Of every tap and the lm_head, in double precision, all sequences at once."""
    reference = Reference(walked.job.checkpoint, model.architecture)
    calibration = model.calibration
    positions = reference.position_embeddings(calibration.ids.shape[1])
    tables: dict[str, Tensor] = {}
    if quantized:
        for step in walked.parts:
            tables |= {key: walked.job.work.linear(step, key).dequantize() for key in walked.job.work.formats(step)}

    def mean(inputs: Tensor) -> Tensor:
        counted = inputs[~calibration.selection, calibration.prefix :].double()
        weighted = counted * calibration.weights()[~calibration.selection].double()[:, None, None]
        return torch.einsum("spi,spj->ij", weighted, counted)

    key = model.architecture.embedding
    hidden = tables.get(key, model.checkpoint.read(key))[calibration.ids]
    hessians = []
    for layer in model.architecture.layers:
        block = reference.block(layer, tables.get)
        hessians += [mean(block.tap(tap, hidden, positions)) for tap in layer.taps]
        hidden = block.forward(hidden, positions)
    return [*hessians, mean(reference.final_norm(hidden))]


def test_the_next_block_reads_the_quantized_block_s_outputs(model: Model, tmp_path: Path) -> None:
    walk = model.walk(tmp_path)
    walk.take_step(0)
    walk.take_step(1)
    shape = (*model.calibration.ids.shape, model.architecture.hidden_size)
    found = walk.job.work.activations("block_000", "quantized", shape).read(0, shape[0])
    reference = Reference(walk.job.checkpoint, model.architecture)
    key = model.architecture.embedding
    hidden = walk.job.work.linear(EMBEDDING, key).dequantize()[model.calibration.ids]
    tables = {key: walk.job.work.linear("block_000", key).dequantize() for key in walk.job.work.formats("block_000")}
    layer = model.architecture.layers[0]
    expected = reference.block(layer, tables.get).forward(hidden, reference.position_embeddings(shape[1]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob("embedding.*.activations"))


def test_round_to_nearest_needs_no_calibration(model: Model, tmp_path: Path) -> None:
    assert not NEAREST.needs_calibration
    started = model.walk(tmp_path, NEAREST)
    assert started.streams is None
    walk = started.run()
    weights = walk.weights()
    for key in model.matrices():
        form = weights.form(key)
        assert form is not None
        expected = round_to_nearest(model.checkpoint.read(key), form)
        assert torch.equal(weights.quantized(key).dequantize(), expected.dequantize())
    records = walk.records
    assert all(record.relative_error is None and record.fallback is None for record in records)
    assert not list(tmp_path.glob("*.activations"))


def test_a_round_to_nearest_walk_resumes(model: Model, tmp_path: Path) -> None:
    model.walked(tmp_path / "whole", NEAREST)
    walk = model.walk(tmp_path / "killed", NEAREST)
    walk.take_step(0)
    walk.take_step(1)
    second = model.walk(tmp_path / "killed", NEAREST)
    assert second.resume_at() == 2
    second.run()
    assert digests(second) == digests(model.walk(tmp_path / "whole", NEAREST))


def test_parts_without_a_format_stay_in_full_precision(model: Model, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"lm_head": None, "embedding": None})
    walk = model.walked(tmp_path, recipe)
    weights = walk.weights()
    assert weights.form(model.architecture.embedding) is None
    assert weights.form(model.architecture.lm_head.weight) is None
    assert weights.form(model.architecture.layers[1].mlp.down.weight) == W4G32


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = Model(tmp_path / "model", tie_word_embeddings=True)
    assert model.architecture.lm_head.weight == model.architecture.embedding
    walk = model.walked(tmp_path / "walk")
    assert walk.job.work.formats(HEAD) == {}
    assert list(walk.job.work.formats(EMBEDDING)) == [model.architecture.embedding]


def test_a_fallback_is_remarked_and_recorded(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Problem.prepare

    def broken(hessian: Tensor, *arguments: Any, **named: Any) -> Problem:
        hessian[3, 3] = torch.nan
        return of(hessian, *arguments, **named)

    monkeypatch.setattr("glmexport.quantization.quantizer.Problem.prepare", broken)
    progress = Silent()
    walk = model.walked(tmp_path, progress=progress)
    count = sum(1 for _ in model.architecture.linears)
    assert sum(1 for remark in progress.remarks if "could not be factored" in remark) == count
    records = walk.records
    assert all(record.fallback and record.relative_error is None for record in records[1:])


Planner = Callable[[int | None], MemoryPlan]


@pytest.fixture(params=[RECIPE, NEAREST], ids=lambda recipe: recipe.name)
def planner(request: pytest.FixtureRequest, model: Model) -> Planner:
    return lambda limit: plan_memory(model.architecture, request.param, limit)


def test_batches_shrink_to_fit_the_limit(planner: Planner) -> None:
    plan = planner(None)
    assert planner(plan.peak_bytes) == plan
    smaller = planner(plan.peak_bytes - 1)
    assert smaller.peak_bytes < plan.peak_bytes
    assert smaller.batch_tokens < plan.batch_tokens and smaller.chunk_weights < plan.chunk_weights


def test_a_limit_that_cannot_be_kept_is_refused_by_name(planner: Planner) -> None:
    with pytest.raises(MachineError, match=r"the limit is 0\.2 GiB") as refused:
        planner(200 << 20)
    assert "--max-memory" in str(refused.value)
    smallest = planner(None)
    while True:
        try:
            smallest = planner(smallest.peak_bytes - 1)
        except MachineError:
            break
    assert (smallest.batch_tokens, smallest.chunk_weights) == (512, 1 << 22)
