"""Inputs that nobody wants: what comes of them is never worse than rounding to nearest with search.

Errors are those of the output on text that neither the Hessian nor the held-out text has seen.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matrices import generator, weights
from models import write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmexport.calibration.sequences import CalibrationSet
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import CalibrationPlan, Format, Recipe, Solver
from glmexport.quantization.goal import Sample
from glmexport.quantization.job import QuantizationJob
from glmexport.quantization.memory import MemoryPlan
from glmexport.quantization.nearest import column_importance, round_to_nearest
from glmexport.quantization.problem import LEAST_TOKENS, Problem
from glmexport.quantization.quantized_model import QuantizedModel
from glmexport.quantization.solve import Solution, gptq
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.walk import walk
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference
from glmexport.results.record import Verdict
from glmexport.validation.gates import build_gates, verdict_of

K, N = 96, 24
W4G32 = Format(bits=4, group_size=32)
FORMS = [Format(bits=2, group_size=32), W4G32, Format(bits=4, group_size=32, symmetric=True)]
form_cases = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.label)
held_cases = pytest.mark.parametrize("held_out", [True, False], ids=["held-out text", "none held out"])


def mixing(rank: int, seed: int) -> Tensor:
    """[rank, K]: inputs of so many dimensions are products with it. Channels differ in size, as in models."""
    random = generator(seed + 100)
    return torch.randn(rank, K, generator=random) * torch.exp(0.7 * torch.randn(K, generator=random)) / rank**0.5


def text(tokens: int, mix: Tensor, seed: int) -> Tensor:
    """Inputs [tokens, K]."""
    return torch.randn(tokens, len(mix), generator=generator(seed)) @ mix


def solve(weight: Tensor, fitted: Tensor, held: Tensor | None, form: Format) -> Solution:
    sample = None if held is None else Sample(held, torch.full((len(held),), 1 / len(held)))
    problem = Problem.of(fitted.T @ fitted / len(fitted), form, Solver(), sample)
    return gptq([weight], problem, form, Solver())


def row_errors(weight: Tensor, fitted: Tensor, form: Format, found: Tensor, evaluated: Tensor) -> tuple[Tensor, Tensor]:
    """Mean square [N] of the output's error, of ``found`` and of the weights rounded to nearest."""
    nearest = round_to_nearest(weight, form, column_importance(fitted.square().mean(0))).dequantize()
    assert bool(found.isfinite().all())
    theirs, ours = ((evaluated @ (weight - matrix).T).double().square().mean(0) for matrix in (nearest, found))
    return ours, theirs


def ratio(weight: Tensor, fitted: Tensor, solution: Solution, evaluated: Tensor) -> float:
    """Of the matrix' error to that of rounding to nearest."""
    ours, theirs = row_errors(weight, fitted, solution.linear.form, solution.linear.dequantize(), evaluated)
    return float(ours.sum() / theirs.sum())


@form_cases
@held_cases
@pytest.mark.parametrize("rank", [1, 4, 24])
def test_collinear_inputs(form: Format, held_out: bool, rank: int) -> None:
    weight, mix = weights(N, K, rank), mixing(rank, rank)
    fitted, held, later = (text(tokens, mix, seed) for seed, tokens in enumerate((600, 100, 600)))
    solution = solve(weight, fitted, held if held_out else None, form)
    assert solution.fallback is None
    assert ratio(weight, fitted, solution, later) < 0.1


@form_cases
@pytest.mark.parametrize("seed", range(3))
def test_dead_columns_that_later_text_reaches(form: Format, seed: int) -> None:
    weight, mix = weights(N, K, seed), mixing(2 * K, seed)
    fitted, held, later = (text(tokens, mix, seed * 10 + part) for part, tokens in enumerate((600, 100, 600)))
    dead = [0, 17, 40, 41, 95]
    fitted[:, dead] = held[:, dead] = 0
    solution = solve(weight, fitted, held, form)
    assert solution.dead_columns == 5
    assert ratio(weight, fitted, solution, later) < 0.95


@form_cases
def test_a_language_that_is_absent(form: Format) -> None:
    """Four languages share nine tenths of the energy of their inputs and have the rest each in 16 directions."""
    ratios: dict[str, list[float]] = {"absent": [], "present": []}
    for seed in range(4):
        weight, common = weights(N, K, seed), mixing(K, seed)
        own = [mixing(16, 1000 * seed + language) for language in range(4)]

        def spoken(language: int, tokens: int, part: int, common: Tensor = common, own: list[Tensor] = own) -> Tensor:
            draw = 10 * part + language
            return 0.9**0.5 * text(tokens, common, draw) + 0.1**0.5 * text(tokens, own[language], draw + 500)

        fitted, held = (torch.cat([spoken(language, n, n) for language in range(3)]) for n in (400, 60))
        solution = solve(weight, fitted, held, form)
        for name, language in (("present", 2), ("absent", 3)):
            ratios[name].append(ratio(weight, fitted, solution, spoken(language, 600, 1)))
    assert sum(ratios["present"]) / 4 < 0.75
    assert sum(ratios["absent"]) / 4 < 1


@form_cases
@held_cases
@pytest.mark.parametrize("seed", range(2))
def test_weights_with_outliers(form: Format, held_out: bool, seed: int) -> None:
    weight, mix = weights(N, K, seed), mixing(48, seed)
    weight[torch.rand(weight.shape, generator=generator(seed)) < 0.01] *= 1000
    fitted, held, later = (text(tokens, mix, part) for part, tokens in enumerate((600, 100, 600)))
    assert ratio(weight, fitted, solve(weight, fitted, held if held_out else None, form), later) < 0.5


@form_cases
@held_cases
def test_rows_and_groups_without_variety(form: Format, held_out: bool) -> None:
    weight, mix = weights(N, K), mixing(48, 1)
    weight[0] = 0
    weight[1], weight[2] = 0.3, -0.3
    weight[3, :32], weight[4, 32:64] = 0.1, 0
    weight[5], weight[6] = 1e-7, 7e4
    fitted, held, later = (text(tokens, mix, part) for part, tokens in enumerate((600, 100, 600)))
    found = solve(weight, fitted, held if held_out else None, form).linear.dequantize()
    ours, theirs = row_errors(weight, fitted, form, found, later)
    assert bool((ours <= theirs * 1.001).all())
    assert bool((found[0] == 0).all())
    # One value for all is one code at a scale that fp16 rounds.
    assert bool(((found - weight)[1:3].abs() <= 2.0**-11 * 0.3).all())


@form_cases
def test_no_input_at_all(form: Format) -> None:
    """Whatever may come later, every column counts the same, as without text."""
    weight, nothing = weights(N, K), torch.zeros(64, K)
    for held in (nothing, None):
        solution = solve(weight, nothing, held, form)
        assert solution.dead_columns == K and solution.fallback is None
        assert ratio(weight, nothing, solution, text(2000, torch.eye(K), 1)) < 1.02


def test_fewer_tokens_than_can_be_fitted_to() -> None:
    weight = weights(N, K)
    token = text(1, mixing(K, 1), 1)
    least = LEAST_TOKENS * K
    few, enough = (
        gptq([weight], Problem.of(token.T @ token, W4G32, Solver(), tokens=tokens), W4G32, Solver())
        for tokens in (least - 1, least)
    )
    assert few.fallback == (
        "the calibration text is worth only 5 different tokens for 96 columns: rounded to nearest; "
        "calibrate on more varied text"
    )
    assert few.nearest_rows == N
    # What is not fitted to does not weigh the columns either.
    assert torch.equal(few.linear.dequantize(), round_to_nearest(weight, W4G32, torch.ones(K)).dequantize())
    assert enough.fallback is None and enough.nearest_rows == 0


def test_a_hessian_that_needs_fp64_is_no_fallback() -> None:
    weight, token = weights(N, 256), torch.randn(1, 256, generator=generator(2)).sign()
    solver = Solver(damping=1e-8)
    solution = gptq([weight], Problem.of(token.T @ token, W4G32, solver), W4G32, solver)
    assert solution.double and solution.fallback is None and solution.damping == 1e-8
    assert solution.relative_error <= solution.round_to_nearest_error


RECIPE = Recipe(
    name="tiny",
    summary="",
    linears=W4G32,
    solver=Solver(polish_rounds=1),
    calibration=CalibrationPlan(tokens=1024, sequence_length=64, quota={"en": 1}),
)
NEAREST = Recipe(name="nearest", summary="", linears=W4G32, solver=Solver(method="round-to-nearest"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(
        path, num_hidden_layers=2, hidden_size=96, intermediate_size=128, num_attention_heads=2, head_dim=64
    )
    return path


def walked_model(
    model: Path, work: Path, recipe: Recipe, ids: Tensor | None = None, progress: Silent | None = None
) -> QuantizedModel:
    calibration = None
    if ids is not None:
        calibration = CalibrationSet(ids, ("en",) * len(ids), 2, torch.arange(len(ids)) % 8 == 7)
    checkpoint = Checkpoint.open(model)
    memory = MemoryPlan(batch_tokens=512, chunk_weights=1 << 20, peak_bytes=0)
    directory = WorkDirectory(work, {"recipe": recipe.digest()})
    progress = progress or Silent()
    return walk(
        QuantizationJob(checkpoint, describe(checkpoint), recipe, calibration, directory, memory, progress)
    )


def divergence(walked: QuantizedModel, ids: Tensor) -> float:
    """Mean KL in nats of the quantized model from the original on ``ids``."""
    reference, layers = Reference(walked.job.checkpoint, walked.job.architecture), walked.job.architecture.layers
    stored = walked.weights()
    solved = {record.key: stored.quantized(record.key).dequantize() for record in walked.records}
    positions, logits = reference.position_embeddings(ids.shape[1]), []
    for substitute in (None, solved.get):
        hidden = reference.embed(ids)
        for layer in layers:
            hidden = reference.block(layer, substitute).forward(hidden, positions)
        logits.append(reference.logits(reference.final_norm(hidden).flatten(0, 1)).double().log_softmax(-1))
    return float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())


def test_one_token_repeated(directory: Path, tmp_path: Path) -> None:
    """The whole walk: as good on other text as rounding to nearest, and nobody can overlook what happened."""
    ids = torch.cat([torch.tensor([[257, 258]]).expand(16, 2), torch.full((16, 62), 65)], 1)
    progress = Silent()
    walked = walked_model(directory, tmp_path / "ours", RECIPE, ids, progress)
    nearest = walked_model(directory, tmp_path / "nearest", NEAREST)
    other = torch.randint(0, 256, (8, 64), generator=generator(3))
    assert divergence(walked, other) == pytest.approx(divergence(nearest, other), rel=1e-6)
    records = walked.records
    assert (
        len(progress.remarks)
        == len(records)
        == sum(1 for index, _ in walked.job.architecture.linears if index is not None)
    )
    assert all(record.fallback and "4 different tokens" in record.fallback for record in records)
    assert "more varied text" in progress.remarks[0]
    tokens = [record.effective_tokens_per_column or 0 for record in records]
    gates = build_gates(sum(record.fallback is not None for record in records), min(tokens), len(records))
    assert [gate.verdict for gate in gates] == [Verdict.WARN] * 2 and verdict_of(gates) is Verdict.WARN


def test_little_text_of_some_variety_is_still_fitted_to(directory: Path, tmp_path: Path) -> None:
    ids = torch.cat(
        [torch.tensor([[257, 258]]).expand(16, 2), torch.randint(0, 256, (16, 62), generator=generator(4))], 1
    )
    walked = walked_model(directory, tmp_path / "ours", RECIPE, ids)
    nearest = walked_model(directory, tmp_path / "nearest", NEAREST)
    assert all(record.fallback is None for record in walked.records)
    other = torch.randint(0, 256, (8, 64), generator=generator(3))
    assert divergence(walked, other) < 0.8 * divergence(nearest, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_weights_that_are_not_finite(directory: Path, tmp_path: Path, key: str, value: float) -> None:
    """The user's to mend: the error names the tensor, and nothing is rounded."""
    model = tmp_path / "model"
    model.mkdir()
    for path in directory.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors[key][3, 5] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    ids = torch.randint(0, 256, (16, 64), generator=generator(4))
    for recipe, given in ((RECIPE, ids), (NEAREST.model_copy(update={"embedding": W4G32}), None)):
        with pytest.raises(CheckpointError, match=f"tensor '{key}' has 1 values that are not finite"):
            walked_model(model, tmp_path / recipe.name, recipe, given)
