"""A mixture of experts through the whole command line: built, validated, generated from, and converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from builds import RECIPE, TARGET, THREADS, Run, build, bundle_weights, digests, session, write_recipe, write_target
from models import MIXTURE, write_checkpoint
from safetensors.torch import load_file, save_file

from glmexport.assembly.read import bundle_folds
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import read_manifest, verify_files
from glmexport.engine.text import generate
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Format
from glmexport.reference.reference import Reference
from glmexport.report.document import read_report
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.workflows.original import Original

SHAPE: dict[str, Any] = MIXTURE | {"num_hidden_layers": 2, "use_qk_norm": True}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and the bundle of it, whose activations stay in fp32."""
    directory = tmp_path_factory.mktemp("mixture")
    write_checkpoint(directory / "checkpoint", "glm4_moe", **SHAPE)
    target = write_target(directory, {"accuracy_level = 4": "accuracy_level = 0"}, "exact")
    build(directory / "checkpoint", directory / "bundle", write_recipe(directory), targets=(str(target),))
    return directory


def test_the_bundle_says_how_its_experts_were_covered(mixture: Path) -> None:
    bundle = mixture / "bundle"
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest)
    (layer,) = manifest.experts
    assert layer.layer == 1 and len(layer.tokens) == MIXTURE["n_routed_experts"]
    assert {matrix.bits for matrix in manifest.matrices if "mlp.experts" in matrix.key} == {4}
    assert {matrix.bits for matrix in manifest.matrices if "mlp.experts" not in matrix.key} == {8}
    report = read_report(bundle / "report.json")
    assert report.quantization is not None
    assert [(row.tokens, row.cold) for row in report.quantization.experts] == [(layer.tokens, layer.cold)]
    gate = next(gate for gate in report.gates if gate.name == "Cold experts")
    assert gate.value == len(layer.cold) and (gate.verdict == "WARN") == bool(layer.cold)
    assert "Calibration text per expert" in (bundle / "report.html").read_text(encoding="utf-8")
    (routing,) = report.routing
    # Random routers decide many positions by next to nothing; most choices stay all the same.
    assert routing.layer == 1 and routing.positions > 21 * 24
    assert 0 < routing.same_set <= routing.same_experts <= 1 and routing.same_experts > 0.5
    assert "Routing by layer" in (bundle / "report.html").read_text(encoding="utf-8")
    assert "## Routing" in (bundle / "report.md").read_text(encoding="utf-8")
    assert report.weights is not None and not report.weights.faults
    assert report.weights.matrices == len(manifest.matrices)
    # What a decoded token reads: a quarter of the experts' bytes and all others.
    whole = manifest.precision.weight_bytes
    experts = sum(
        matrix.bits_per_weight * 128 * 64 * (2 if "gate_up" in matrix.key else 1) / 8
        for matrix in manifest.matrices
        if "mlp.experts" in matrix.key
    )
    embedding = 264 * 128 * next(matrix.bits_per_weight for matrix in manifest.matrices) / 8
    expected = whole - experts * 3 / 4 - embedding * 263 / 264
    assert manifest.precision.bytes_per_decoded_token == pytest.approx(expected, rel=1e-3)


def test_the_graph_computes_what_its_weights_do_in_transformers_modules(mixture: Path) -> None:
    bundle = mixture / "bundle"
    original = Original.open(str(mixture / "checkpoint"), Silent())
    weights = bundle_weights(bundle, mixture / "checkpoint")
    reference = Reference(original.checkpoint.folded(bundle_folds(bundle)), original.architecture)
    ids = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(3))
    table = weights.quantized(original.architecture.embedding)
    head = weights.quantized(original.architecture.lm_head.weight)
    assert table is not None and head is not None
    hidden = table.lookup(ids)
    for layer in original.architecture.layers:
        hidden = reference.block(layer, weights.dequantized).forward(hidden, reference.position_embeddings(40))
    expected = head.apply(reference.final_norm(hidden)).numpy()
    runtime = session(bundle, "scoring.onnx")
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 40), np.int64)}
    for value in runtime.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
    assert np.abs(runtime.run(None, feeds)[0] - expected).max() < 1e-4


def test_only_chosen_experts_are_computed(mixture: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    runtime = onnxruntime.InferenceSession(mixture / "bundle" / "model.onnx", options)
    feeds = {"input_ids": np.array([[7]]), "attention_mask": np.ones((1, 1), np.int64)}
    for value in runtime.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    runtime.run(None, feeds)
    events = json.loads(Path(runtime.end_profiling()).read_text())
    # Of experts, by the name of the node: embedded in that of the RoutedExperts that they belonged to.
    computed = [
        event["name"]
        for event in events
        if event.get("args", {}).get("op_name") == "MatMulNBits" and "RoutedExperts" in event["name"]
    ]
    assert len(set(computed)) == len(computed) == 2 * MIXTURE["num_experts_per_tok"]


def test_onnxruntime_genai_generates_from_it(mixture: Path) -> None:
    tokenizer = Tokenizer.open(mixture / "bundle")
    prompt = tokenizer.prefix + tokenizer.encode("The quick brown fox")
    pieces = list(generate(Bundle.open(mixture / "bundle"), prompt, max_tokens=8, threads=THREADS))
    runtime = session(mixture / "bundle", "model.onnx")
    ids = list(prompt)
    for piece in pieces:
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        for value in runtime.get_inputs():
            if value.name.startswith("past"):
                feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        assert int(runtime.run(None, feeds)[0][0, -1].argmax()) == piece.token
        ids.append(piece.token)
    assert pieces


def test_the_command_line_builds_what_the_same_build_is(mixture: Path, tmp_path: Path, run: Run) -> None:
    target = mixture / "exact.toml"
    arguments = ["--target", target, "--recipe", mixture / "small.toml", "--threads", THREADS]
    outcome = run("build", mixture / "checkpoint", *arguments, "-o", tmp_path / "bundle", "--json")
    assert outcome.code == 2, outcome.stderr  # INCONCLUSIVE: the quick validation has too little text.
    assert digests(tmp_path / "bundle") == digests(mixture / "bundle")
    outcome = run("run", tmp_path / "bundle", "-p", "Hello", "--max-tokens", 4, "--threads", THREADS, "--json")
    assert outcome.code == 0 and outcome.document
    outcome = run("inspect", mixture / "checkpoint", "--json")
    assert outcome.document["experts"] == {"layers": 1, "routed": 16, "chosen": 4, "groups": 4}
    assert outcome.document["parameters"]["router"] == 16 * 128 + 16
    estimates = {row["target"]: row["refused"] for row in outcome.document["estimates"]}
    assert estimates["x86-avx2"] is None and "mixture of experts" in estimates["webgpu"]
    shown = run("inspect", mixture / "checkpoint").stderr
    assert "4 of 16 a token" in shown and "webgpu: " in shown


def test_an_fp8_checkpoint_is_built_from_and_judged_by_what_its_numbers_stand_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", "glm4_moe", **SHAPE)
    path = tmp_path / "checkpoint" / "model.safetensors"
    stored = {}
    for key, tensor in load_file(path).items():
        stored[key] = tensor
        if key.endswith("_proj.weight"):
            blocks = [-(-size // 128) for size in tensor.shape]
            stored[key] = (tensor.float() / 0.001).to(torch.float8_e4m3fn)
            stored[f"{key}_scale_inv"] = torch.full(blocks, 0.001)
    save_file(stored, path, {"format": "pt"})
    config = tmp_path / "checkpoint" / "config.json"
    table = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": table}))
    (built,) = build(tmp_path / "checkpoint", tmp_path / "bundle", write_recipe(tmp_path))
    assert built.report.fidelity.overall.kl_mean_nats < 0.05
    assert built.report.weights is not None and not built.report.weights.faults
    # transformers cannot be timed on it here, and that is said.
    assert built.report.performance.original is None
    assert "fp8" in str(built.report.performance.original_absent_because)


def test_a_budget_gives_every_expert_its_own_format(mixture: Path, tmp_path: Path, run: Run) -> None:
    target = mixture / "exact.toml"
    arguments = ["--target", target, "--recipe", write_recipe(tmp_path), "--bpw", "5.2", "--threads", THREADS]
    outcome = run("build", mixture / "checkpoint", *arguments, "-o", tmp_path / "bundle", "--json")
    assert outcome.code in (1, 2), outcome.stderr  # The quick validation of random weights has too little text.
    manifest = read_manifest(tmp_path / "bundle")
    assert 5.1 < manifest.precision.bits_per_weight <= 5.2
    experts = {
        part: {group.format for group in manifest.allocation if group.expert_part == part}
        for part in ("expert_gate_up", "expert_down")
    }
    assert max(map(len, experts.values())) > 1
    bits = {key: group.format.bits for group in manifest.allocation for key in group.keys}
    assert {matrix.key: matrix.bits for matrix in manifest.matrices} == bits
    report = read_report(tmp_path / "bundle" / "report.json")
    assert report.weights is not None and not report.weights.faults
    assert "Bits by expert" in (tmp_path / "bundle" / "report.html").read_text(encoding="utf-8")
    assert outcome.document
    told = run("inspect", mixture / "checkpoint", "--bpw", "5.2", "--json").document["estimates"]
    row = next(row for row in told if row["target"] == "x86-avx2")
    assert row["refused"] is None and row["bits_per_weight"] == pytest.approx(5.2)
    rotary = Original.open(str(mixture / "checkpoint"), Silent()).architecture.rotary_bytes
    assert row["bundle_bytes"] - rotary == pytest.approx(manifest.precision.weight_bytes, rel=0.01)
    refused = run("build", mixture / "checkpoint", "--target", TARGET, "--bpw", "2", "-o", tmp_path / "out")
    assert refused.code == 64 and "smallest formats need" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_to_gptq_and_back_keeps_every_code(mixture: Path, tmp_path: Path, run: Run) -> None:
    checkpoint, bundle = mixture / "checkpoint", mixture / "bundle"
    refused = run(
        "convert", bundle, "--against", checkpoint, "--to", "gptq", "--layout", "transformers", "-o", tmp_path / "t"
    )
    assert refused.code == 64 and "mixtures of experts" in refused.stderr
    outcome = run("convert", bundle, "--against", checkpoint, "--to", "gptq", "-o", tmp_path / "gptq")
    assert outcome.code == 0, outcome.stderr
    original = Original.open(str(tmp_path / "gptq"), Silent())
    assert original.architecture.routed <= set(original.checkpoint.quantized)
    (built,) = build(tmp_path / "gptq", tmp_path / "again", "stored")
    before, after = (bundle_weights(path, checkpoint) for path in (bundle, built.directory))
    for key in original.architecture.routed:
        first, second = before.quantized(key), after.quantized(key)
        assert first is not None and second is not None and first.digest() == second.digest()


def test_the_recipe_sets_what_every_token_passes(mixture: Path, tmp_path: Path) -> None:
    text = RECIPE + "\n[shared]\nbits = 4\ngroup_size = 32\n"
    (built,) = build(mixture / "checkpoint", tmp_path / "bundle", write_recipe(tmp_path, text))
    assert built.manifest.recipe.shared == Format(bits=4, group_size=32)
    assert {matrix.bits for matrix in built.manifest.matrices if matrix.layer is not None} == {4}
