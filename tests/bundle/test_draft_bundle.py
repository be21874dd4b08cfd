"""What a bundle holds of the layer that predicts further ahead, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from builds import FORMATS, RECIPE, THREADS, Run, build, write_recipe, write_target
from models import write_predicting
from predicting import INDEXED, PREDICTING, SPARSE
from safetensors.torch import load_file, save_file

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.loop import read_loop
from glmexport.bundle.manifest import read_manifest
from glmexport.foundation.progress import Silent
from glmexport.foundation.target import shipped_targets
from glmexport.reference.reference import Reference
from glmexport.report.document import read_report
from glmexport.validation.weights import check_weights
from glmexport.workflows.original import Original

NEAREST = f'summary = "Rounded"\n{FORMATS}\n[solver]\nmethod = "round-to-nearest"\n'
LITE = PREDICTING["glm4_moe_lite"]
PREFIX = "model.layers.2"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("predicting") / "checkpoint"
    write_predicting(path, LITE[0], num_hidden_layers=2, **LITE[1])
    return path


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, tmp_path_factory) -> dict[str, Path]:
    """Of one checkpoint and one quantization: our own loop's, and onnxruntime-genai's."""
    base = tmp_path_factory.mktemp("bundles")
    heads = write_target(base, {"latent_cache = true": "latent_cache = false"}, "heads")
    latents = write_target(base, {}, "latents")
    build(checkpoint, base / "out", write_recipe(base, NEAREST), targets=(str(heads), str(latents)))
    return {name: base / "out" / name for name in ("heads", "latents")}


def test_a_draft_graph_where_our_loop_decodes(bundles: dict[str, Path], checkpoint: Path) -> None:
    """Its matrices have the format of what every token passes, and tables that are the model's are stored once."""
    manifest, config = read_manifest(bundles["latents"]), read_loop(bundles["latents"])
    assert manifest.draft is not None and config is not None and config.draft is not None
    records = {matrix.key: matrix for matrix in manifest.draft.matrices}
    draft = Original.open(str(checkpoint), Silent()).architecture.token_prediction
    assert draft is not None
    linears = {linear.weight for linear in (draft.projection, *draft.layer.linears)}
    assert set(records) == linears and len(linears) > 2 * 16
    assert {(matrix.bits, matrix.layer) for matrix in records.values()} == {(8, 2)}
    assert not set(records) & {matrix.key for matrix in manifest.matrices}
    copies = {f"{PREFIX}.embed_tokens.weight", f"{PREFIX}.shared_head.head.weight"}
    assert set(manifest.source.unused) == copies
    assert manifest.source.unused[f"{PREFIX}.shared_head.head.weight"] == "the same as lm_head.weight"
    graph = onnx.load(bundles["latents"] / "draft.onnx", load_external_data=False).graph
    assert [value.name for value in graph.output][:2] == ["logits", "hidden_states"]
    files = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    assert files == {"weights/draft.data", "weights/embedding.data", "weights/head.data"}


def test_no_draft_graph_where_onnxruntime_genai_decodes(bundles: dict[str, Path]) -> None:
    """Each of its tensors is named with the reason, in the manifest and in the report."""
    bundle = bundles["heads"]
    manifest = read_manifest(bundle)
    assert manifest.draft is None and not (bundle / "draft.onnx").exists()
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    assert "hidden_states" not in {value.name for value in graph.output}
    reason = manifest.source.unused[f"{PREFIX}.eh_proj.weight"]
    assert "onnxruntime-genai" in reason
    assert sum(name.startswith(PREFIX) for name in manifest.source.unused) > 30
    said = "\n".join(read_report(bundle / "report.json").limits)
    assert f"Not in the bundle: {PREFIX}.eh_proj.weight and " in said and reason in said
    assert reason in (bundle / "report.md").read_text(encoding="utf-8").replace("\\", "")


def test_its_weights_are_read_back_too(bundles: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundles["latents"])
    assert manifest.draft is not None
    original = Original.open(str(checkpoint), Silent())
    reference = Reference(original.checkpoint, original.architecture)
    check = check_weights(Bundle.open(bundles["latents"]), reference, Silent())
    assert check.faults == () and check.matrices == len(manifest.matrices) + len(manifest.draft.matrices)
    data = bundles["latents"] / "weights" / "draft.data"
    before = data.read_bytes()
    graph = onnx.load(bundles["latents"] / "draft.onnx", load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == f"{PREFIX}.eh_proj.weight.q")
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    data.write_bytes(before[:offset] + bytes([before[offset] ^ 255]) + before[offset + 1 :])
    try:
        faults = check_weights(Bundle.open(bundles["latents"]), reference, Silent()).faults
    finally:
        data.write_bytes(before)
    assert [fault.tensor for fault in faults] == [f"{PREFIX}.eh_proj.weight"]


def test_run_guesses_and_counts(bundles: dict[str, Path], run: Run) -> None:
    options = ["-p", "Hello", "--max-tokens", 9, "--threads", THREADS]
    answers = {}
    for name, method in (("latents", "none"), ("latents", "lookup"), ("latents", "mtp"), ("heads", "lookup")):
        ran = run("run", bundles[name], *options, "--speculate", method, "--json")
        assert ran.code == 0, ran.stderr
        answers[name, method] = ran.document
    assert answers["latents", "none"]["speculation"] is None
    assert set(answers["latents", "mtp"]["speculation"]) == {"method", "steps", "drafted", "accepted"}
    assert answers["latents", "mtp"]["speculation"]["drafted"] > 0
    shown = run("run", bundles["latents"], *options, "--speculate", "mtp", "--draft-tokens", 3)
    assert "mtp, 3 tokens at a time" in shown.stderr and "guessed tokens accepted" in shown.stderr
    refused = run("run", bundles["heads"], *options, "--speculate", "mtp")
    assert refused.code == 64 and "only where latents are cached" in refused.stderr
    refused = run("run", bundles["latents"], *options, "--draft-tokens", 3)
    assert refused.code == 64 and "nothing is guessed" in refused.stderr


def test_inspect_says_what_becomes_of_it(checkpoint: Path, run: Run) -> None:
    said = run("inspect", checkpoint, "--json").document
    assert said["token_prediction"]["layer"] == 2
    drafting = {name for name, fate in said["token_prediction"]["targets"].items() if fate == "drafts"}
    assert drafting == {target.name for target in shipped_targets() if target.graph.latent_cache}
    assert sum(count for part, count in said["parameters"].items() if part != "all") == said["parameters"]["all"]
    shown = " ".join(run("inspect", checkpoint).stderr.split())
    assert "MTP layer layer 2," in shown and "a draft graph, for run --speculate mtp" in shown


def test_a_family_without_latents_lists_it_as_unused(tmp_path: Path, run: Run) -> None:
    family, changes = PREDICTING["glm4_moe"]
    write_predicting(tmp_path / "checkpoint", family, num_hidden_layers=2, **changes)
    shown = " ".join(run("inspect", tmp_path / "checkpoint").stderr.split())
    assert "unused, it predicts a token further ahead" in shown and "onnxruntime-genai runs this bundle" in shown
    recipe = write_recipe(tmp_path, 'summary = "Everything as it is"\n')
    arguments = ["--target", "x86-avx2", "--recipe", recipe, "--threads", THREADS, "-o", tmp_path / "bundle"]
    built = run("build", tmp_path / "checkpoint", *arguments)
    assert f"{PREFIX}.* (" in built.stderr and "is not used: predicts a token further ahead" in built.stderr
    assert read_manifest(tmp_path / "bundle").draft is None


def test_gptq_goes_by_the_layer_and_an_own_table_is_kept(tmp_path: Path, run: Run) -> None:
    """Through the command line, with an indexer; the copy of the embedding was trained on."""
    path = tmp_path / "checkpoint"
    write_predicting(path, "glm_moe_dsa", num_hidden_layers=2, **INDEXED)
    tensors = load_file(path / "model.safetensors")
    tensors[f"{PREFIX}.embed_tokens.weight"][5] += 1
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    recipe = write_recipe(tmp_path, RECIPE.replace("[solver]", "[solver]\nasymmetric = false"))
    built = run(
        "build", path, "--target", "x86-avx2", "--recipe", recipe, "--threads", THREADS, "-o", tmp_path / "bundle"
    )
    assert built.code == 2, built.stderr  # too little text for a verdict
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.draft is not None
    assert f"{PREFIX}.embed_tokens.weight" in {matrix.key for matrix in manifest.draft.matrices}
    assert all(matrix.relative_error is None for matrix in manifest.draft.matrices)
    assert set(manifest.source.unused) == {f"{PREFIX}.shared_head.head.weight"}
    document = json.loads((tmp_path / "bundle" / "report.json").read_text())
    assert document["weights"]["faults"] == []
    answer = run("run", tmp_path / "bundle", "-p", "Hello", "--speculate", "mtp", "--max-tokens", 5, "--json")
    assert answer.code == 0 and answer.document["speculation"]["steps"] > 0


@pytest.mark.parametrize("change", ["missing", "shape", "second"])
def test_a_layer_that_is_not_whole_is_unused(tmp_path: Path, change: str) -> None:
    path: Any = tmp_path / "checkpoint"
    write_predicting(path, "glm4_moe_lite", num_hidden_layers=2, **SPARSE)
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    if change == "missing":
        del tensors[f"{PREFIX}.hnorm.weight"]
    elif change == "shape":
        tensors[f"{PREFIX}.eh_proj.weight"] = torch.zeros(128, 128)
    else:
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(128, 256)
        config["num_nextn_predict_layers"] = 2
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    original = Original.open(str(path), Silent())
    if change == "second":
        assert original.architecture.token_prediction is not None
        assert set(original.unused) == {"model.layers.3.eh_proj.weight"}
    else:
        assert original.architecture.token_prediction is None
        assert all("incomplete" in reason for reason in original.unused.values()) and len(original.unused) > 20
