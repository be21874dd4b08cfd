"""Bundles of families with latent attention, from checkpoint to tokens, with either cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds import FORMATS, RECIPE, THREADS, Run, build, bundle_weights, small_checkpoint, write_recipe, write_target
from safetensors.torch import load_file

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import read_manifest
from glmexport.engine.core.cache import SharedCaches
from glmexport.engine.core.graph_engine import GROWTH, GraphSequence
from glmexport.engine.core.greedy import distributions
from glmexport.engine.generation import GenerationSession
from glmexport.engine.opening import open_engine
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.errors import BundleError, InputError
from glmexport.foundation.progress import Silent
from glmexport.validation.runtimes import RuntimeRequest
from glmexport.validation.speed import take_turns
from glmexport.workflows.original import Original

LITE, DSA = "glm4_moe_lite", "glm_moe_dsa"
INDEXED = {"index_topk": 64, "index_n_heads": 32, "index_head_dim": 24, "indexer_types": ["full", "shared"]}
FULL = 'summary = "Everything as it is"\n'
NEAREST = f'summary = "Rounded"\n{FORMATS}\n[solver]\nmethod = "round-to-nearest"\n'
CONTEXT = 1024
PROMPT = np.random.default_rng(0).integers(0, 250, 600).tolist()


@dataclass(frozen=True)
class Pair:
    """Bundles of one checkpoint with the two caches, in fp32 arithmetic, and the model in transformers."""

    model: Any
    checkpoint: Path
    latents: Path
    heads: Path


@pytest.fixture(scope="module", params=[FULL, NEAREST], ids=["full", "rounded"])
def pair(request, tmp_path_factory) -> Pair:
    base = tmp_path_factory.mktemp("pair")
    model = small_checkpoint(base / "checkpoint", LITE, max_position_embeddings=CONTEXT, eos_token_id=[256])
    fp32 = {"accuracy_level = 4": "accuracy_level = 0"}
    targets = [
        write_target(base, fp32, "latents"),
        write_target(base, {**fp32, "latent_cache = true": "latent_cache = false"}, "heads"),
    ]
    recipe = write_recipe(base, request.param)
    build(base / "checkpoint", base / "bundles", recipe, targets=tuple(map(str, targets)))
    return Pair(model, base / "checkpoint", base / "bundles" / "latents", base / "bundles" / "heads")


def caches_after(bundle: Path, prompt: list[int], steps: int) -> SharedCaches:
    """The caches of a sequence behind a prompt and some greedy tokens."""
    engine = open_engine(Bundle.open(bundle), THREADS)
    sequence = engine.begin(len(prompt) + steps)
    for _ in distributions(sequence, prompt, steps, engine.chunk):
        pass
    assert isinstance(sequence, GraphSequence) and isinstance(sequence.caches, SharedCaches)
    return sequence.caches


def test_a_bundle_has_the_file_of_its_loop_alone(pair: Pair) -> None:
    assert (pair.latents / "loop.json").is_file() and not (pair.latents / "genai_config.json").exists()
    assert (pair.heads / "genai_config.json").is_file() and not (pair.heads / "loop.json").exists()


def test_both_caches_give_the_same_logits_and_the_same_tokens(pair: Pair) -> None:
    """One through onnxruntime-genai and one through our loop; a prompt of several chunks, a cache that grows."""
    ids = np.array(PROMPT[:300])
    latents, heads = (
        ScoringSession(Bundle.open(bundle), THREADS).logits(ids) for bundle in (pair.latents, pair.heads)
    )
    assert np.abs(latents - heads).max() <= 1e-4
    ours, theirs = (GenerationSession.open(Bundle.open(bundle), THREADS) for bundle in (pair.latents, pair.heads))
    assert ours.context_length == theirs.context_length == CONTEXT and ours.ends == theirs.ends
    generated = 0
    for length in (1, 40, GROWTH - 3, 600):
        tokens = ours.tokens(PROMPT[:length], 24)
        assert tokens == theirs.tokens(PROMPT[:length], 24)
        generated += len(tokens)
    assert generated > 40


def test_sequences_together_are_those_alone(pair: Pair) -> None:
    session = GenerationSession.open(Bundle.open(pair.latents), THREADS)
    prompts = [PROMPT[start : start + 20] for start in (0, 30, 70)]
    assert session.together(prompts, [16] * len(prompts)) == [session.tokens(prompt, 16) for prompt in prompts]


def test_what_a_run_allocates_is_what_inspect_says(pair: Pair, run: Run) -> None:
    caches = caches_after(pair.latents, PROMPT[:300], 5)
    assert caches.capacity == 2 * GROWTH
    said = run("inspect", pair.checkpoint, "--json").document
    assert said["latent_kv_bytes_per_token"] == 2 * 4 * (32 + 16)
    assert caches.bytes == caches.capacity * said["latent_kv_bytes_per_token"]
    # What onnxruntime-genai allocates are the graph's inputs, key and value of every head.
    from builds import session

    heads = [value.shape for value in session(pair.heads, "model.onnx").get_inputs() if "past" in value.name]
    assert said["kv_bytes_per_token"] == sum(4 * shape[1] * shape[3] for shape in heads)
    shown = run("inspect", pair.checkpoint).stderr
    assert "384 bytes a token in fp32 as latents, 3,072 as keys and values of every head" in " ".join(shown.split())


def test_the_end_of_the_context_ends_an_answer(pair: Pair) -> None:
    session = GenerationSession.open(Bundle.open(pair.latents), THREADS)
    long = (PROMPT * 2)[: CONTEXT - 3]
    assert len(session.tokens(long, 24)) <= 3
    with pytest.raises(InputError, match="1024 tokens and the context 1024"):
        session.tokens((PROMPT * 2)[:CONTEXT], 1)


def test_every_matrix_can_be_read_back(pair: Pair) -> None:
    """Also the one that is only there as rows of codes."""
    architecture = Original.open(str(pair.checkpoint), Silent()).architecture
    records = {matrix.key: matrix for matrix in read_manifest(pair.latents).matrices}
    weights = bundle_weights(pair.latents, pair.checkpoint)
    assert set(weights.quantized_keys) == set(records)
    if records:
        assert set(records) == {architecture.embedding} | {linear.weight for _, linear in architecture.linears}
    for key, record in records.items():
        linear = weights.quantized(key)
        assert linear is not None and linear.digest() == record.digest


@pytest.mark.parametrize("layout", ["transformers", "gptqmodel"])
def test_as_a_gptq_checkpoint_gate_and_up_stay_apart(pair: Pair, tmp_path: Path, run: Run, layout: str) -> None:
    """In transformers' layout too, whose module of the family has them so; codes come back as they were."""
    arguments = ["--against", pair.checkpoint, "--to", "gptq", "--layout", layout, "-o", tmp_path / "gptq"]
    converted = run("convert", pair.latents, *arguments)
    weights = bundle_weights(pair.latents, pair.checkpoint)
    if not weights.quantized_keys:
        assert converted.code == 64 and "full precision" in converted.stderr
        return
    assert converted.code == 0, converted.stderr
    names = load_file(tmp_path / "gptq" / "model.safetensors")
    assert "model.layers.0.mlp.gate_proj.qweight" in names and "model.layers.1.mlp.up_proj.qweight" in names
    again = Original.open(str(tmp_path / "gptq"), Silent())
    for layer in again.architecture.layers:
        for linear in layer.linears:
            expected = weights.dequantized(linear.weight)
            assert expected is not None and torch.equal(again.checkpoint.read(linear.weight), expected)


def test_a_loop_file_that_is_broken(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "loop.json").write_text("{}")
    with pytest.raises(BundleError, match="not what a loop reads"):
        GenerationSession.open(Bundle(tmp_path, read_manifest(pair.latents)), THREADS)
    (tmp_path / "loop.json").write_bytes((pair.latents / "loop.json").read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot load"):
        GenerationSession.open(Bundle(tmp_path, read_manifest(pair.latents)), THREADS)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> tuple[Any, Path]:
    base = tmp_path_factory.mktemp("sparse")
    return small_checkpoint(base / "checkpoint", DSA, **INDEXED), base


def test_sparse_attention_generates_what_transformers_does(sparse: tuple[Any, Path]) -> None:
    """With prompts below and above what a token attends to."""
    model, base = sparse
    build(base / "checkpoint", base / "bundle", write_recipe(base, FULL))
    session = GenerationSession.open(Bundle.open(base / "bundle"), THREADS)
    for length in (3, 55, 200):
        prompt = torch.tensor([PROMPT[:length]])
        expected = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, length:].tolist()
        assert session.tokens(PROMPT[:length], 20) == expected
    caches = caches_after(base / "bundle", PROMPT[:9], 1)
    # One index key a layer that selects; the context is shorter than a step of growth.
    assert (caches.capacity, caches.bytes) == (256, 256 * 4 * (2 * (32 + 16) + 24))


def test_sparse_attention_through_the_command_line(sparse: tuple[Any, Path], run: Run) -> None:
    """GPTQ, validation and an answer; the calibration keeps within what is attended to."""
    _, base = sparse
    # Random weights answer alike to all tokens, so that outputs of the original's say little about single rows.
    recipe = write_recipe(base, RECIPE.replace("[solver]", "[solver]\nasymmetric = false"), "symmetric")
    arguments = ["--target", "x86-avx2", "--recipe", recipe, "--threads", THREADS, "-o", base / "gptq"]
    built = run("build", base / "checkpoint", *arguments)
    assert built.code == 2, built.stderr  # too little text for a verdict
    assert json.loads((base / "gptq" / "report.json").read_text())["weights"]["faults"] == []
    keys = {matrix.key for matrix in read_manifest(base / "gptq").matrices}
    assert keys and not any("indexer" in key for key in keys)
    answer = run("run", base / "gptq", "-p", "Hello", "--max-tokens", 5, "--threads", THREADS, "--json")
    assert answer.code == 0 and 0 < len(answer.document["tokens"]) <= 5


def test_a_target_without_the_cache_refuses_it(sparse: tuple[Any, Path], tmp_path: Path, run: Run) -> None:
    _, base = sparse
    target = write_target(tmp_path, {"latent_cache = true": "latent_cache = false"}, "heads")
    refused = run("build", base / "checkpoint", "--target", target, "-o", tmp_path / "bundle")
    assert refused.code == 64 and "latent_cache = true" in refused.stderr
    assert not (tmp_path / "bundle").exists()


def test_speed_is_that_of_the_loop(pair: Pair) -> None:
    """Measured beside the same model with keys and values of every head, and where its nodes ran is told."""
    requests = [
        RuntimeRequest(
            runtime="onnxruntime-genai", directory=str(bundle), prompt=tuple(PROMPT[:9]), generated_tokens=4, threads=1
        )
        for bundle in (pair.latents, pair.heads)
    ]
    ours, theirs = take_turns(requests, 0, Silent())
    assert "over latents" in ours.runtime and "genai" in theirs.runtime
    assert all(len(taken.steps_s) == 3 and taken.ttft_s > 0 for turns in (ours, theirs) for taken in turns.rounds)
    operators = {node.operator for node in ours.nodes}
    assert "ScatterND" in operators and "GroupQueryAttention" not in operators
    assert {node.provider for node in ours.nodes} == {"CPUExecutionProvider"}
