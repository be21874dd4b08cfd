"""Latent attention, an indexer and mixtures of experts together, from checkpoint to tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builds import RECIPE, THREADS, Run, build, write_recipe, write_target
from models import MIXTURE, write_checkpoint

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import read_manifest
from glmexport.engine.generation import GenerationSession
from glmexport.foundation.progress import Silent
from glmexport.reference.reference import Reference
from glmexport.report.document import read_report
from glmexport.validation.reference import reference_states
from glmexport.validation.texts import EvaluationText
from glmexport.workflows.original import Original

LAYERS: dict[str, Any] = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
INDEXED = {"index_topk": 64, "index_n_heads": 32, "index_head_dim": 24, "indexer_types": ["full", "shared", "shared"]}
FAMILIES: dict[str, dict[str, Any]] = {"glm4_moe_lite": {}, "glm_moe_dsa": INDEXED}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory) -> tuple[Any, Path]:
    path = tmp_path_factory.mktemp("checkpoint")
    return write_checkpoint(path, request.param, **MIXTURE, **LAYERS, **FAMILIES[request.param]), path


def test_the_reference_hands_selections_through_experts(checkpoint: tuple[Any, Path], tmp_path: Path) -> None:
    """Texts longer and shorter than what a token attends to; experts take many texts together."""
    model, path = checkpoint
    original = Original.open(str(path), Silent())
    reference = Reference(original.checkpoint, original.architecture)
    generator = torch.Generator().manual_seed(0)
    texts = [
        EvaluationText(str(length), "en", torch.randint(0, 250, (length,), generator=generator), 1)
        for length in (100, 20, 81)
    ]
    states = reference_states(reference, texts, tmp_path, Silent(), batch=2)
    for index, text in enumerate(texts):
        expected = model.model(text.ids[None]).last_hidden_state
        assert float((states.load(index) - expected).abs().max()) < 1e-5


def test_the_bundle_generates_what_transformers_does(checkpoint: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = checkpoint
    build(path, tmp_path / "bundle", write_recipe(tmp_path, 'summary = "Everything as it is"\n'))
    session = GenerationSession.open(Bundle.open(tmp_path / "bundle"), THREADS)
    ids = torch.randint(0, 250, (1, 120), generator=torch.Generator().manual_seed(1))
    for length in (5, 120):
        expected = model.generate(ids[:, :length], max_new_tokens=12, do_sample=False)[0, length:].tolist()
        assert session.tokens(ids[0, :length].tolist(), 12) == expected


def test_it_is_quantized_validated_and_asked(checkpoint: tuple[Any, Path], tmp_path: Path, run: Run) -> None:
    _, path = checkpoint
    # Random weights answer alike to all tokens, so that outputs of the original's say little about single rows.
    recipe = write_recipe(tmp_path, RECIPE.replace("[solver]", "[solver]\nasymmetric = false"))
    target = write_target(tmp_path, {"accuracy_level = 4": "accuracy_level = 0"}, "exact")
    arguments = ["--target", target, "--recipe", recipe, "--threads", THREADS, "-o", tmp_path / "bundle"]
    built = run("build", path, *arguments)
    assert built.code in (1, 2), built.stderr  # too little text for a verdict
    report = read_report(tmp_path / "bundle" / "report.json")
    assert report.weights is not None and all(fault.kind != "other" for fault in report.weights.faults)
    original = Original.open(str(path), Silent())
    matrices = {matrix.key: matrix.bits for matrix in read_manifest(tmp_path / "bundle").matrices}
    assert set(matrices) == {original.architecture.embedding} | {
        linear.weight for _, linear in original.architecture.linears
    }
    assert report.weights.matrices == len(matrices)
    # Attention of a mixture of experts is 8-bit by default, experts are 4-bit.
    assert all(bits == (4 if "mlp.experts" in key else 8) for key, bits in matrices.items())
    answer = run("run", tmp_path / "bundle", "-p", "Hello", "--max-tokens", 5, "--threads", THREADS, "--json")
    assert answer.code == 0 and 0 < len(answer.document["tokens"]) <= 5
