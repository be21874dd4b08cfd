"""Whole builds of small checkpoints: what is in a bundle, and that it is what the checkpoint and recipe make of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from builds import (
    FORMATS,
    RECIPE,
    TARGET,
    THREADS,
    Run,
    Sample,
    build,
    bundle_weights,
    carried,
    digests,
    session,
    small_checkpoint,
    write_recipe,
    write_target,
)
from rich.console import Console

from glmexport.assembly.read import bundle_folds
from glmexport.bundle.manifest import read_manifest, verify_files
from glmexport.cli.build import calibration_text
from glmexport.cli.verdict import show
from glmexport.foundation.errors import EXIT_INCONCLUSIVE
from glmexport.foundation.progress import Silent, Track
from glmexport.foundation.recipe import CalibrationPlan, open_recipe
from glmexport.reference.reference import Reference
from glmexport.report.document import HTML_NAME, read_report
from glmexport.results.record import Verdict
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.reference import reference_states
from glmexport.validation.texts import EvaluationText
from glmexport.workflows.original import Original

GRAPHS = ("model.onnx", "scoring.onnx")
ALIGNMENT = 4096


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the other family, and of a checkpoint whose embedding is its head too."""
    directory = tmp_path_factory.mktemp("glm")
    small_checkpoint(directory / "checkpoint", "glm", tie_word_embeddings=True, attention_bias=False)
    (built,) = build(directory / "checkpoint", directory / "bundle", write_recipe(directory))
    return built.directory


@pytest.fixture(params=["glm4", "glm-tied"])
def bundle(request: pytest.FixtureRequest, sample: Sample) -> Path:
    return sample.bundle if request.param == "glm4" else request.getfixturevalue("glm")


def test_a_bundle_consists_of(bundle: Path) -> None:
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if not path.is_dir()}
    assert found >= {
        *GRAPHS,
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "bundle.json",
        "report.json",
        "report.html",
        "report.md",
        "report.xml",
        "weights/embedding.data",
        "weights/block_000.data",
        "weights/block_001.data",
        "weights/head.data",
    }
    assert all(path.count("/") == 0 or path.startswith("weights/") for path in found)
    assert sum(path.startswith("weights/") for path in found) == 4
    for name in found:
        path = bundle / name
        assert not path.is_symlink() and path.stat().st_nlink == 1
        assert path.stat().st_mode & 0o444 == 0o444
    verify_files(bundle, read_manifest(bundle))
    # Nothing of the build is left beside it.
    assert not [path.name for path in bundle.parent.iterdir() if path.name.startswith(".")]


def external(bundle: Path, graph: str) -> dict[str, ir.ExternalTensor]:
    initializers = ir.load(bundle / graph).graph.initializers
    return {
        name: value.const_value
        for name, value in initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def test_every_byte_of_the_weights_is_referenced(bundle: Path) -> None:
    spans: dict[str, set[tuple[int, int]]] = {}
    for graph in GRAPHS:
        for tensor in external(bundle, graph).values():
            assert tensor.offset is not None and tensor.length is not None
            assert tensor.length == tensor.nbytes
            spans.setdefault(str(tensor.location), set()).add((tensor.offset, tensor.offset + tensor.length))
    assert {f"weights/{path.name}" for path in (bundle / "weights").iterdir()} == set(spans)
    for name, used in spans.items():
        content = (bundle / name).read_bytes()
        ordered = sorted(used)
        assert ordered[0][0] == 0 and ordered[-1][1] == len(content)
        for (_, stop), (start, _) in pairwise(ordered):
            assert 0 <= start - stop < ALIGNMENT
            assert not any(content[stop:start])


def test_both_graphs_share_their_weights(bundle: Path) -> None:
    one, other = (external(bundle, graph) for graph in GRAPHS)
    for name in set(one) & set(other):
        assert (one[name].location, one[name].offset) == (other[name].location, other[name].offset)
    assert len(set(one) & set(other)) > 10


@pytest.mark.parametrize("graph", GRAPHS)
def test_onnx_runtime_runs_the_graphs(bundle: Path, graph: str) -> None:
    (logits, *cache) = score(bundle, np.array([[1, 2, 3, 4]]), graph)
    assert logits.shape[1] == (1 if graph == "model.onnx" else 4)
    assert np.isfinite(logits).all() and len(cache) == 4


def score(bundle: Path, ids: np.ndarray, graph: str = "scoring.onnx") -> list[np.ndarray]:
    runtime = session(bundle, graph)
    feeds = {"input_ids": ids.astype(np.int64), "attention_mask": np.ones(ids.shape, np.int64)}
    for value in runtime.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    return list(runtime.run(carried(runtime), feeds))


def test_the_configuration_of_onnxruntime_genai(sample: Sample) -> None:
    config = json.loads((sample.bundle / "genai_config.json").read_text(encoding="utf-8"))
    original = sample.model.config
    assert config["model"]["eos_token_id"] == original.eos_token_id
    assert config["model"]["context_length"] == 256
    assert config["model"]["decoder"]["num_hidden_layers"] == 2
    assert config["model"]["decoder"]["head_size"] == 32
    assert config["search"]["do_sample"] is False


def test_the_manifest(sample: Sample) -> None:
    manifest = read_manifest(sample.bundle)
    assert (manifest.family, manifest.recipe.name, manifest.target.name) == ("glm4", "small", TARGET)
    assert manifest.source.name == "checkpoint"
    assert manifest.source.digest == Original.open(str(sample.checkpoint), Silent()).checkpoint.digest()
    assert manifest.source.parameters == sum(value.numel() for value in sample.model.parameters())
    assert manifest.calibration is not None
    assert (manifest.calibration.shared_documents, manifest.calibration.shared_lines) == (0, 0)
    assert set(manifest.calibration.tokens_per_language) == {"zh", "en"}
    # Embedding, seven matrices a layer less the stacked gate and up, and the head.
    assert len(manifest.matrices) == 1 + 2 * 6 + 1
    assert all(matrix.fallback is None for matrix in manifest.matrices)
    stored = sum(path.stat().st_size for path in (sample.bundle / "weights").iterdir())
    assert manifest.precision.weight_bytes < stored < 1.5 * manifest.precision.weight_bytes
    assert 4.0 < manifest.precision.bits_per_weight_linears < 4.8


def test_the_report(sample: Sample) -> None:
    report = read_report(sample.bundle / "report.json")
    assert report.model_dump_json() == sample.built.report.model_dump_json()
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.subject.bundle == "bundle"
    assert report.subject.bundle_digest == read_manifest(sample.bundle).digest()
    assert len(report.fidelity.languages) == 21
    assert {row.positions for row in report.fidelity.languages} == {24}
    total = sum(share.kl_mean_nats for share in report.shares)
    assert total == pytest.approx(report.fidelity.overall.kl_mean_nats, rel=0.2)
    assert "INCONCLUSIVE" in (sample.bundle / "report.html").read_text(encoding="utf-8")


def test_the_same_input_gives_the_same_bytes(sample: Sample, tmp_path: Path) -> None:
    (again,) = build(sample.checkpoint, tmp_path / "bundle", sample.recipe)
    assert digests(again.directory) == digests(sample.bundle)


class Counting(Silent):
    """Remembers what was begun."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Track]:
        self.begun.append(label)
        with super().track(label, total) as track:
            yield track


def test_two_targets_share_one_quantization(sample: Sample, tmp_path: Path) -> None:
    exact = write_target(tmp_path, {"accuracy_level = 4": "accuracy_level = 0"}, "exact")
    counting = Counting()
    built = build(
        sample.checkpoint, tmp_path / "out", sample.recipe, targets=(TARGET, str(exact)), progress=counting
    )
    assert counting.begun.count("Quantizing") == 1
    assert [bundle.directory for bundle in built] == [tmp_path / "out" / TARGET, tmp_path / "out" / "exact"]
    one, other = (digests(bundle.directory) for bundle in built)
    assert one == digests(sample.bundle)
    assert {name for name in one if one[name] != other[name]} == {*GRAPHS, "bundle.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {TARGET, "exact"}


def test_the_command_line_prints_one_document(sample: Sample, tmp_path: Path, run: Run) -> None:
    arguments = ["--target", TARGET, "--recipe", sample.recipe, "--threads", THREADS, "-o", tmp_path / "bundle"]
    outcome = run("build", sample.checkpoint, *arguments, "--json")
    assert outcome.code == EXIT_INCONCLUSIVE, outcome.stderr
    (entry,) = outcome.document["bundles"]
    assert entry["bundle"] == str(tmp_path / "bundle")
    assert entry["digest"] == read_manifest(sample.bundle).digest()
    assert entry["report"] == json.loads((tmp_path / "bundle" / "report.json").read_text(encoding="utf-8"))
    assert "INCONCLUSIVE" in outcome.stderr
    before = digests(tmp_path / "bundle")
    # Again over it, and once as text: then stdout carries nothing.
    forced = run("build", sample.checkpoint, *arguments, "--force")
    assert (forced.code, forced.stdout) == (EXIT_INCONCLUSIVE, "")
    assert digests(tmp_path / "bundle") == before
    validated = run("validate", tmp_path / "bundle", "--against", sample.checkpoint, "--threads", THREADS, "--json")
    assert validated.code == EXIT_INCONCLUSIVE
    assert validated.document["fidelity"] == entry["report"]["fidelity"]
    assert digests(tmp_path / "bundle") == before
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}


def test_what_a_killed_replacement_left_is_no_obstacle(sample: Sample, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(sample.bundle, bundle)
    shutil.copytree(sample.bundle, tmp_path / ".bundle.replaced")
    shutil.copytree(sample.bundle, tmp_path / ".bundle.partial")
    (bundle / "model.onnx").write_bytes(b"old")
    build(sample.checkpoint, bundle, sample.recipe, force=True)
    assert digests(bundle) == digests(sample.bundle)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}


def test_text_of_the_user_is_calibrated_on(sample: Sample, tmp_path: Path) -> None:
    text = tmp_path / "own.jsonl"
    said = {"user": "What is a bundle? " * 40, "assistant": "A folder. " * 40}
    turns = [{"role": role, "content": content} for role, content in said.items()]
    lines = [json.dumps({"messages": turns}), json.dumps({"text": "Plain text. " * 80})]
    text.write_text("\n".join(lines), encoding="utf-8")
    recipe = write_recipe(tmp_path, RECIPE + "user = 2\n")
    (built,) = build(sample.checkpoint, tmp_path / "bundle", recipe, calibration=(text,))
    calibration = built.manifest.calibration
    assert calibration is not None
    assert set(calibration.tokens_per_language) == {"zh", "en", "user"}
    assert calibration.documents > 2


def test_more_chat_templates_stay_in_their_folder(sample: Sample, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(sample.checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text("with {{ tools }}", encoding="utf-8")
    (built,) = build(checkpoint, tmp_path / "bundle", "rtn-w4g32")
    messages = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    before, after = (Tokenizer.open(place).render(messages, tools=[tool]) for place in (checkpoint, built.directory))
    assert before == after and before.startswith("with [{")


# What the graphs compute


def logits_of_the_bundle_s_weights(bundle: Path, checkpoint: Path, ids: list[int], scratch: Path) -> np.ndarray:
    """The original's own layers, with the bundle's dequantized weights in place of theirs."""
    original = Original.open(str(checkpoint), Silent())
    architecture = original.architecture
    reference = Reference(original.checkpoint.folded(bundle_folds(bundle)), architecture)
    weights = bundle_weights(bundle, checkpoint)
    table = weights.dequantized(architecture.embedding)
    head = weights.dequantized(architecture.lm_head.weight)
    assert table is not None and head is not None
    # One judged token more, so that every position of ids has its state.
    text = EvaluationText("text", "en", torch.tensor([*ids, 0]), 1)
    given = reference.exchanged(weights.dequantized, lambda wanted: table[wanted])
    states = reference_states(given, [text], scratch, Silent()).states(0)
    return (states @ head.T).numpy()


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "4 bits": (RECIPE, {}),
    "4 bits, tied": (RECIPE, {"tie_word_embeddings": True}),
    "symmetric": (RECIPE.replace("group_size = 32", "group_size = 32\nsymmetric = true"), {}),
    "symmetric, tied": (
        RECIPE.replace("group_size = 32", "group_size = 32\nsymmetric = true"),
        {"tie_word_embeddings": True},
    ),
    "8 bits": (RECIPE.replace("bits = 4", "bits = 8"), {}),
    "2 bits": (RECIPE.replace("bits = 4", "bits = 2", 1), {}),
    "mixed": (RECIPE + "\n[budget]\nbits_per_weight = 6.5\nprobe_tokens = 128\n", {}),
    "4 bits everywhere": (RECIPE.replace("bits = 8", "bits = 4"), {}),
    "groups of 128, glm": (RECIPE.replace("group_size = 32", "group_size = 128"), {"model_type": "glm"}),
    "a width that does not fill its last group": (
        RECIPE.replace("group_size = 32", "group_size = 64"),
        {"intermediate_size": 160},
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_scoring_computes_with_the_shipped_weights(name: str, tmp_path: Path) -> None:
    text, changes = WAYS[name]
    small_checkpoint(tmp_path / "checkpoint", **{"model_type": "glm4"} | changes)
    exact = write_target(tmp_path, {"accuracy_level = 4": "accuracy_level = 0"}, "exact")
    recipe = write_recipe(tmp_path, text)
    (built,) = build(tmp_path / "checkpoint", tmp_path / "bundle", recipe, targets=(str(exact),))
    ids = np.random.default_rng(5).integers(0, 250, 40)
    expected = logits_of_the_bundle_s_weights(built.directory, tmp_path / "checkpoint", ids.tolist(), tmp_path)
    (logits, *_) = score(built.directory, ids[None])
    assert np.abs(logits[0] - expected).max() <= 1e-3
    # And those weights are near the original's: but for rounding, what takes back the errors of those before them.
    checkpoint = Original.open(str(tmp_path / "checkpoint"), Silent()).checkpoint.folded(bundle_folds(built.directory))
    for matrix in built.manifest.matrices:
        ours, theirs = bundle_weights(built.directory, tmp_path / "checkpoint").dequantized(matrix.key), matrix.key
        assert ours is not None
        original = checkpoint.read(theirs)
        assert ours.shape == original.shape
        error = float((ours - original).pow(2).sum() / original.pow(2).sum())
        assert error < {2: 0.6, 4: 0.05, 8: 0.03}[matrix.bits]


def test_a_tied_head_shares_the_embedding_s_bytes(glm: Path) -> None:
    tensors = external(glm, "model.onnx")
    places: dict[tuple[str, int | None], list[str]] = {}
    for name, tensor in tensors.items():
        places.setdefault((str(tensor.location), tensor.offset), []).append(name)
    shared = [sorted(names) for names in places.values() if len(names) > 1]
    assert any("codes" in " ".join(names) for names in shared)
    # Codes, and their scales and zero points unless both operators read one and the same tensor.
    for names in shared:
        assert all("embed_tokens" in name for name in names)
        assert len({tensors[name].nbytes for name in names}) == 1
    codes = 272 * 128
    assert codes < (glm / "weights" / "embedding.data").stat().st_size
    assert sum((glm / "weights").joinpath(name).stat().st_size for name in ("head.data",)) < codes


def test_what_a_budget_costs_is_in_the_manifest_and_the_report(sample: Sample, tmp_path: Path) -> None:
    budget = "[budget]\nbits_per_weight = 5.5\nprobe_tokens = 128\n"
    recipe = write_recipe(tmp_path, f"{RECIPE}\n{budget}", "mixed")
    (built,) = build(sample.checkpoint, tmp_path / "bundle", recipe)
    manifest = read_manifest(built.directory)
    assert manifest.precision.bits_per_weight <= 5.5
    formats = {matrix.key: (matrix.bits, matrix.group_size) for matrix in manifest.matrices}
    for group in manifest.allocation:
        assert {formats.pop(key) for key in group.keys} == {(group.format.bits, group.format.group_size)}
        assert group.loss_nats > 0
    assert not formats
    quantization = built.report.quantization
    assert quantization is not None
    assert [(group.name, group.loss_nats, group.stored_bits) for group in quantization.groups] == [
        (group.name, group.loss_nats, group.bits) for group in manifest.allocation
    ]
    assert "Where the bits went" in (built.directory / HTML_NAME).read_text(encoding="utf-8")
    console = Console(record=True, width=200, file=StringIO())
    show(console, built.report, built.directory)
    _, table = console.export_text().split("Where the bits went", 1)
    assert sum(int(row.split()[6]) for row in table.splitlines()[2:] if "groups of" in row) == len(manifest.allocation)
    assert read_manifest(sample.bundle).allocation == ()


def test_what_a_build_says_of_its_text() -> None:
    own = (Path("a.txt"), Path("b.jsonl"))
    plan = {"tokens": 2048, "sequence_length": 64}
    alone = open_recipe("w4g32").model_copy(update={"calibration": CalibrationPlan(quota={"user": 1}, **plan)})
    assert calibration_text(open_recipe("w4g32"), ()) == "shipped corpora"
    assert calibration_text(open_recipe("w4g32"), own) == "shipped corpora, a.txt, b.jsonl"
    assert calibration_text(alone, own) == "a.txt, b.jsonl"
    assert calibration_text(open_recipe("rtn-w4g32"), ()) == "none: this recipe needs no text"


def test_round_to_nearest_needs_no_text(sample: Sample, tmp_path: Path) -> None:
    solver = "[solver]\nmethod = 'round-to-nearest'\nscale_search = false\n"
    recipe = write_recipe(tmp_path, f"summary = 'x'\n{FORMATS}\n{solver}", "rtn")
    (built,) = build(sample.checkpoint, tmp_path / "bundle", recipe)
    assert built.manifest.calibration is None and built.report.calibration is None
    assert all(matrix.relative_error is None for matrix in built.manifest.matrices)
    for matrix in built.manifest.matrices:
        ours = bundle_weights(built.directory, sample.checkpoint).quantized(matrix.key)
        assert ours is not None
        original = Original.open(str(sample.checkpoint), Silent()).checkpoint.read(matrix.key)
        step = ours.scales.float().abs().repeat_interleave(32, dim=1)
        # Half a step, and what the rounding of scales to fp16 and of the zero point adds at the ends of a range.
        assert float(((ours.dequantize() - original).abs() / step).max()) <= 0.65


def test_fp32_is_the_original(sample: Sample, tmp_path: Path) -> None:
    (built,) = build(sample.checkpoint, tmp_path / "bundle", "fp32")
    ids = np.random.default_rng(6).integers(0, 250, (1, 40))
    with torch.inference_mode():
        expected = sample.model(torch.from_numpy(ids)).logits.numpy()
    (logits, *_) = score(built.directory, ids)
    assert np.abs(logits - expected).max() <= 1e-4
    assert built.manifest.matrices == () and built.report.quantization is None and built.report.shares == ()
    assert built.manifest.precision.bits_per_weight == 32
    assert built.report.fidelity.overall.kl_mean_nats < 1e-6
    assert built.report.fidelity.overall.top1_agreement == 1
