"""The walk through a mixture of experts: natural routing, one expert at a time, cold ones on what all would read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MIXTURE
from tiny import MEMORY, RECIPE, W4G32, W8G32, Model, digests

from glmexport.architecture.registry import FAMILIES
from glmexport.bundle.records import QuantizedMatrix
from glmexport.calibration.sequences import effective_count
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Format, Solver
from glmexport.quantization import mixture
from glmexport.quantization.memory import plan_memory
from glmexport.quantization.mixture import PRIOR, Mixture
from glmexport.quantization.mixture_step import MixtureStep
from glmexport.quantization.quantized_model import QuantizedModel
from glmexport.quantization.record import coverage
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.streams import ORIGINAL, QUANTIZED
from glmexport.quantization.walk import Walk
from glmexport.reference.reference import Reference

EXPERTS = MIXTURE["n_routed_experts"]
NEAREST = RECIPE.model_copy(update={"solver": Solver(method="round-to-nearest"), "calibration": None})


def mixture_model(path: Path, **changes: Any) -> Model:
    """One dense layer and one of experts, and calibration sequences."""
    return Model(path, model_type="glm4_moe", **(MIXTURE | changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return mixture_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def walked(model: Model, tmp_path_factory: pytest.TempPathFactory) -> QuantizedModel:
    return model.walked(tmp_path_factory.mktemp("walked"))


def test_experts_are_committed_one_by_one_in_their_format_and_the_rest_in_that_of_all(
    model: Model, walked: QuantizedModel
) -> None:
    weights, routed = walked.weights(), model.architecture.routed
    assert len(routed) == 2 * EXPERTS
    for _, linear in model.architecture.linears:
        assert weights.form(linear.weight) == (W4G32 if linear.weight in routed else W8G32)
    router = model.architecture.layers[1].mlp.router
    assert weights.form(router.weight) is None and weights.form(router.bias) is None
    assert "block_001.shared" in walked.parts and f"block_001.expert_{EXPERTS - 1:03d}" in walked.parts
    assert set(digests(walked)) == {f"{part}.safetensors" for part in ("folds", *walked.parts)}
    records = walked.records
    expected = {model.architecture.embedding} | {linear.weight for _, linear in model.architecture.linears}
    assert {record.key for record in records} == expected and len(records) == len(expected)


def test_the_recipe_says_what_every_token_passes(model: Model, tmp_path: Path) -> None:
    walk = model.walked(tmp_path, NEAREST.model_copy(update={"shared": Format(bits=4, group_size=64)}))
    weights = walk.weights()
    layer = model.architecture.layers[1]
    assert weights.form(layer.mlp.shared.down.weight) == Format(bits=4, group_size=64)
    assert weights.form(layer.attention.query.weight) == Format(bits=4, group_size=64)
    assert weights.form(layer.mlp.experts[3].down.weight) == W4G32


def routes(model: Model, walk: QuantizedModel, layer: int) -> torch.Tensor:
    """Experts [sequences, length, chosen] of every position, by transformers' own router behind quantized layers."""
    weights = walk.weights()

    def substitute(key: str) -> torch.Tensor | None:
        return weights.quantized(key).dequantize() if weights.form(key) else None

    reference = Reference(walk.job.checkpoint, model.architecture)
    ids = model.calibration.ids
    hidden = weights.quantized(model.architecture.embedding).lookup(ids)
    positions = reference.position_embeddings(ids.shape[1])
    for before in model.architecture.layers[:layer]:
        hidden = reference.block(before, substitute).forward(hidden, positions)
    block = reference.block(model.architecture.layers[layer], substitute)
    chosen: list[torch.Tensor] = []
    block.module.mlp.gate.register_forward_hook(lambda _module, _inputs, outputs: chosen.append(outputs[2]))
    block.forward(hidden, positions)
    return chosen[0].reshape(*ids.shape, -1)


def test_coverage_counts_the_positions_that_the_router_of_the_quantized_model_sends(
    model: Model, walked: QuantizedModel
) -> None:
    calibration = model.calibration
    experts = routes(model, walked, 1)[~calibration.selection, calibration.prefix :]
    records = walked.records
    (layer,) = coverage(records)
    assert layer.layer == 1 and len(layer.tokens) == EXPERTS
    expected = [int((experts == index).any(-1).sum()) for index in range(EXPERTS)]
    # A position may sit on the edge between two experts, where batches of another size decide otherwise.
    assert sum(abs(a - b) for a, b in zip(layer.tokens, expected, strict=True)) <= 4
    assert sum(layer.tokens) == experts.numel()
    assert max(layer.tokens) > 2 * min(layer.tokens)
    for index, tokens in enumerate(layer.tokens):
        assert (index in layer.cold) or tokens >= model.architecture.hidden_size / 16


def test_the_quantized_stream_behind_the_layer_is_that_of_the_committed_weights(
    model: Model, tmp_path: Path, walked: QuantizedModel
) -> None:
    walk = model.walk(tmp_path)
    for index in range(3):
        walk.take_step(index)
    weights = walked.weights()

    def substitute(key: str) -> torch.Tensor | None:
        return weights.quantized(key).dequantize() if weights.form(key) else None

    reference = Reference(walk.job.checkpoint, model.architecture)
    plain = Reference(model.checkpoint, model.architecture)
    ids = model.calibration.ids
    positions = reference.position_embeddings(ids.shape[1])
    quantized, original = weights.quantized(model.architecture.embedding).lookup(ids), plain.embed(ids)
    for layer in model.architecture.layers:
        quantized = reference.block(layer, substitute).forward(quantized, positions)
        original = plain.block(layer).forward(original, positions)
    shape = (*ids.shape, model.architecture.hidden_size)
    given = walk.job.work.activations("block_001", QUANTIZED, shape).read(0, len(ids))
    # Where a position sits on the edge between two experts, one of them may be another.
    near = (given - quantized).abs().amax(-1) < 1e-4
    assert near.float().mean() > 0.999
    given = walk.job.work.activations("block_001", ORIGINAL, shape).read(0, len(ids))
    assert ((given - original).abs().amax(-1) < 1e-4).float().mean() > 0.999


@pytest.mark.parametrize("killed_at", [0, 1, 7])
def test_a_walk_that_is_killed_between_experts_goes_on_with_the_next(
    model: Model, walked: QuantizedModel, tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model.walk(tmp_path)
    commit, left = WorkDirectory.commit, [killed_at]

    def killed(self: WorkDirectory, step: str, *rest: Any, **more: Any) -> None:
        if "expert" in step:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        commit(self, step, *rest, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(WorkDirectory, "commit", killed)
        first.run()
    solved: list[str] = []

    def noted(self: WorkDirectory, step: str, *rest: Any, **more: Any) -> None:
        if step.startswith("block_001."):
            solved.append(step)
        commit(self, step, *rest, **more)

    monkeypatch.setattr(WorkDirectory, "commit", noted)
    second = model.walked(tmp_path)
    assert solved == [*(f"block_001.expert_{index:03d}" for index in range(killed_at, EXPERTS)), "block_001.shared"]
    assert digests(second) == digests(walked)


def passage_of(model: Model, walk: Walk) -> Any:
    """Behind the attention of the layer of experts."""
    for index in range(2):
        walk.take_step(index)
    step = walk.open_step(2)
    assert isinstance(step, MixtureStep) and step.passage is not None
    step.passage.move_on(step.quantize().weight)
    return step.passage


def test_hessians_are_means_over_the_positions_that_chose_the_expert_shrunk_toward_all(
    model: Model, tmp_path: Path
) -> None:
    passage = passage_of(model, model.walk(tmp_path))
    layer, calibration = model.architecture.layers[1], model.calibration
    measured = Mixture(passage, layer.mlp, MEMORY.batch_tokens)
    block = passage.streams.reference.block(layer, only=())
    shape = (*calibration.ids.shape, model.architecture.hidden_size)
    inputs = block.normed(layer.branches[1], passage.residual[QUANTIZED].read(0, shape[0])).flatten(0, 1)
    experts, shares = block.route(inputs)
    counted = torch.ones(shape[:2], dtype=torch.bool)
    counted[calibration.selection] = False
    counted[:, : calibration.prefix] = False
    text = (calibration.weights()[:, None] * counted).flatten().double()

    def mean(weights: torch.Tensor) -> torch.Tensor:
        return (inputs.double().T * (weights / weights.sum())) @ inputs.double()

    torch.testing.assert_close(measured.pool.double(), mean(text), atol=1e-5, rtol=1e-4)
    for index in (0, 5):
        mlp = layer.mlp.experts[index]
        mine = (experts == index).double() * shares.double()
        weights = text * mine.sum(-1).square()
        found = measured.measure(mlp, mlp.gate_up, None)
        inside = weights > 0
        tokens = effective_count(calibration.contexts.flatten()[inside], weights[inside])
        assert found.own_tokens == pytest.approx(tokens) and found.chosen == int(inside.sum())
        prior = PRIOR * mlp.gate_up.in_features
        expected = (tokens * mean(weights) + prior * mean(text)) / (tokens + prior)
        torch.testing.assert_close(found.measured.hessian.double(), expected, atol=1e-5, rtol=1e-3)


def test_an_expert_that_nobody_chose_is_fitted_to_what_all_would_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture_model(tmp_path / "model", n_group=1, topk_group=1)
    path = tmp_path / "model" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[key][3] = -10.0
    save_file(tensors, path, {"format": "pt"})
    model.checkpoint = model.architecture.presented(Checkpoint.open(tmp_path / "model"))
    walk = model.walked(tmp_path / "walk")
    records = walk.records
    (layer,) = coverage(records)
    assert layer.tokens[3] == 0 and 3 in layer.cold
    cold = [record for record in records if ".experts.3." in record.key]
    assert all(record.fallback is None and record.relative_error is not None for record in cold)
    # Without a pool there is nothing to fit it to, and that is said.
    monkeypatch.setattr(mixture, "PRIOR", 0.0)
    progress = Silent()
    again = model.walked(tmp_path / "again", progress=progress)
    records = again.records
    refused = [record for record in records if ".experts.3." in record.key]
    assert all("rounded to nearest" in str(record.fallback) for record in refused)
    assert sum("experts.3." in remark for remark in progress.remarks) == 2


def test_calibrated_experts_lose_less_than_rounded_ones(model: Model, walked: QuantizedModel, tmp_path: Path) -> None:
    nearest = model.walked(tmp_path, NEAREST)
    ids = model.calibration.ids[model.calibration.selection]

    def loss(walk: QuantizedModel) -> float:
        weights = walk.weights()
        reference = Reference(walk.job.checkpoint, model.architecture)

        def answers(*substitute: Any) -> torch.Tensor:
            hidden = reference.embed(ids)
            for layer in model.architecture.layers:
                block = reference.block(layer, *substitute)
                hidden = block.forward(hidden, reference.position_embeddings(ids.shape[1]))
            return hidden

        given = answers(lambda key: weights.quantized(key).dequantize() if weights.form(key) else None)
        return float((given - answers()).square().sum())

    assert loss(walked) < 0.8 * loss(nearest)


def test_memory_is_that_of_one_expert(model: Model) -> None:
    published = FAMILIES["glm4_moe"](_published(256))
    fewer = FAMILIES["glm4_moe"](_published(64))
    gptq = RECIPE.model_copy(update={"solver": Solver()})
    assert plan_memory(published, gptq, 16 << 30).peak_bytes <= 16 << 30
    assert plan_memory(published, gptq).peak_bytes == plan_memory(fewer, gptq).peak_bytes


def _published(experts: int) -> Any:
    """What the declaration reads of a checkpoint of the largest published shape."""
    from types import SimpleNamespace

    from glmexport.checkpoint.config import ConfigReader

    values = {
        "model_type": "glm4_moe", "hidden_act": "silu", "hidden_size": 6144, "num_attention_heads": 96,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "num_hidden_layers": 4,
        "vocab_size": 151552, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "attention_bias": True,
        "eos_token_id": [151329], "n_routed_experts": experts, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "pad_token_id": 151329, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    }  # fmt: skip
    reader = ConfigReader(values, "config.json")
    return SimpleNamespace(config=reader, generation_config=None, model_type="glm4_moe", tensors={})


def test_a_matrix_that_every_token_passes_is_in_no_coverage() -> None:
    whole = QuantizedMatrix(
        key="a", layer=1, part="expert_gate_up", bits=4, group_size=32, symmetric=False, bits_per_weight=4.5,
        dead_columns=0, effective_tokens_per_column=None
    )
    assert coverage([whole]) == ()
    warm = whole.model_copy(update={"chosen": 90, "effective_tokens_per_column": 1 / 16})
    cold = whole.model_copy(update={"chosen": 3, "effective_tokens_per_column": 0.05})
    (layer,) = coverage([warm, cold, warm])
    assert layer.tokens == (90, 3, 90) and layer.cold == (1,)


def test_the_shared_expert_takes_the_layer_back_to_the_original(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fitted to the original's stream it leaves less of what the routed experts lost than fitted to its own output."""

    def distance(directory: Path) -> float:
        walk = model.walk(directory)
        for index in range(3):
            walk.take_step(index)
        streams = [walk.streams.committed("block_001", name) for name in (QUANTIZED, ORIGINAL)]
        sequences = len(model.calibration.languages)
        ours, theirs = (stream.read(0, sequences)[:, model.calibration.prefix :] for stream in streams)
        return float((ours - theirs).square().mean())

    fitted = distance(tmp_path / "fitted")
    measure = Mixture.measure_shared
    monkeypatch.setattr(Mixture, "measure_shared", lambda self, *rest: replace(measure(self, *rest), goal=None))
    assert fitted < 0.97 * distance(tmp_path / "plain")
