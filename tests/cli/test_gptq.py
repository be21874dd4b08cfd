"""GPTQ checkpoints through the command line: bundles that keep their codes, and checkpoints written from bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import TARGET, THREADS, Run, Sample, build, bundle_weights, small_checkpoint, write_recipe, write_target
from gptq_files import QUANTIZE_CONFIG, WEIGHTS, Written, quantize
from safetensors.torch import load_file
from test_bad_input import check, everything

import glmexport.workflows.build
from glmexport.assembly.gptq import GptqCheckpoint
from glmexport.bundle.manifest import read_manifest
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import EXIT_INCONCLUSIVE, EXIT_INPUT
from glmexport.foundation.progress import Silent
from glmexport.workflows.original import Original

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
GATE_UP = "model.layers.0.mlp.gate_up_proj.weight"
NEAREST = """summary = "Nearest"
[linears]
bits = 4
group_size = 32
symmetric = {symmetric}
[solver]
method = "round-to-nearest"
"""
EXCEPTIONS: dict[str, Any] = {
    "formats": {"layers.0.self_attn.o_proj": None, "layers.1.mlp.down_proj": (8, 64)},
    "dynamic": {r"-:.*layers\.0\..*o_proj": {}, r"+:.*\.1\.mlp\.down_proj": {"bits": 8, "group_size": 64}},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full precision."""
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    small_checkpoint(directory)
    return directory


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles without their validation, where only what they hold is of interest."""
    monkeypatch.setattr(glmexport.workflows.build, "measure_and_report", lambda *_: None)


def check_codes(bundle: Path, written: Written) -> None:
    weights = bundle_weights(bundle, written.directory)
    for key, matrix in written.matrices.items():
        linear = weights.quantized(key)
        assert linear is not None
        groups = matrix.groups[torch.arange(0, matrix.codes.shape[1], linear.form.group_size)]
        assert torch.equal(linear.codes.long(), matrix.codes)
        assert torch.equal(linear.scales, matrix.scales[:, groups])
        if linear.zero_points is None:
            assert bool((matrix.zero_points == 2 ** (matrix.bits - 1)).all())
        else:
            assert torch.equal(linear.zero_points.long(), matrix.zero_points[:, groups])
        assert torch.equal(linear.dequantize().double(), matrix.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"split": True, "version": "gptq"},
        {"split": False, "version": "gptq_v2", "symmetric": True},
        {"split": True, "version": "gptq", "group_size": -1},
        {"split": True, "version": "gptq_v2", **EXCEPTIONS},
        {"formats": {"lm_head": (4, 32)}},
    ],
    ids=["split-v1", "fused-v2-sym", "whole-rows", "exceptions", "lm_head"],
)
def test_a_bundle_keeps_every_code(source: Path, tmp_path: Path, quick: None, options: dict[str, Any]) -> None:
    written = quantize(source, tmp_path / "gptq", **options)
    (built,) = build(written.directory, tmp_path / "bundle", "stored")
    check_codes(built.directory, written)
    assert {matrix.key for matrix in built.manifest.matrices} > set(written.matrices)
    if "dynamic" in options:
        assert O_PROJ not in written.matrices
        assert bundle_weights(built.directory, written.directory).quantized(O_PROJ) is None


def test_only_the_arithmetic_of_the_runtime_differs(source: Path, tmp_path: Path, run: Run) -> None:
    written = quantize(source, tmp_path / "gptq", symmetric=True)
    target = write_target(tmp_path, {"accuracy_level = 4": "accuracy_level = 0"}, "exact")
    output = tmp_path / "bundle"
    common = ("--threads", str(THREADS), "--json")
    outcome = run("build", written.directory, "--target", target, "-o", output, *common)
    assert outcome.code == EXIT_INCONCLUSIVE, outcome.stderr
    report = outcome.document["bundles"][0]["report"]
    linears, _, runtime = report["shares"]
    assert linears["kl_mean_nats"] == pytest.approx(0, abs=1e-9)
    assert abs(runtime["kl_mean_nats"]) < 1e-6
    assert report["performance"]["original"] is None
    assert "GPTQ" in report["performance"]["original_absent_because"]
    assert read_manifest(output).recipe.name == "stored"
    assert run("validate", output, "--against", written.directory, *common).code == EXIT_INCONCLUSIVE


def test_inspect_says_what_it_is_quantized_to(source: Path, tmp_path: Path, run: Run) -> None:
    written = quantize(source, tmp_path / "gptq", **EXCEPTIONS)
    document = run("inspect", written.directory, "--json").document
    assert document["quantization"] == {"method": "gptq", "matrices": {"w4g32": 10, "w8g64": 1}}
    assert {row["recipe"] for row in document["estimates"]} == {"stored"}
    assert "gptq, 10 x w4g32, 1 x w8g64" in run("inspect", written.directory).stderr
    assert run("inspect", source, "--json").document["quantization"] is None


def test_a_quantized_embedding_is_refused(source: Path, tmp_path: Path, run: Run) -> None:
    written = quantize(source, tmp_path / "gptq", formats={"embed_tokens": (4, 32)})
    outcome = run("build", written.directory, "--target", TARGET, "-o", tmp_path / "bundle")
    check(outcome, EXIT_INPUT, "embedding", "Quantize the linears only")


def test_a_quantized_head_is_not_converted(source: Path, tmp_path: Path, run: Run, quick: None) -> None:
    written = quantize(source, tmp_path / "gptq", formats={"lm_head": (4, 32)})
    (built,) = build(written.directory, tmp_path / "bundle", "stored")
    outcome = run("convert", built.directory, "--against", written.directory, "--to", "gptq", "-o", tmp_path / "again")
    check(outcome, EXIT_INPUT, "lm_head.weight is stored as GPTQ")


@pytest.mark.parametrize("command", ["build", "inspect"])
def test_a_quantized_checkpoint_is_not_quantized_again(source: Path, tmp_path: Path, run: Run, command: str) -> None:
    written = quantize(source, tmp_path / "gptq")
    more = ("--target", TARGET, "-o", tmp_path / "bundle") if command == "build" else ()
    outcome = run(command, written.directory, "--recipe", "rtn-w4g32", *more)
    check(outcome, EXIT_INPUT, "quantized already (gptq, 12 x w4g32)", "rtn-w4g32", "Leave --recipe out")
    assert not (tmp_path / "bundle").exists()


def test_a_checkpoint_in_full_precision_has_no_codes_to_keep(source: Path, tmp_path: Path, run: Run) -> None:
    outcome = run("build", source, "--recipe", "stored", "--target", TARGET, "-o", tmp_path / "bundle")
    check(outcome, EXIT_INPUT, "stored", "in full precision")


def test_a_target_without_kernels_for_the_stored_format_is_refused(source: Path, tmp_path: Path, run: Run) -> None:
    written = quantize(source, tmp_path / "gptq", group_size=16)
    sizes = "group_sizes = [16, 32, 64, 128, 256]"
    target = write_target(tmp_path, {sizes: "group_sizes = [32, 128]"}, "narrow")
    outcome = run("build", written.directory, "--target", target, "-o", tmp_path / "bundle")
    check(outcome, EXIT_INPUT, "w4g16", "no kernels")


@pytest.fixture(scope="module", params=[False, True], ids=["asymmetric", "symmetric"])
def nearest(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A bundle of rounded weights, not validated."""
    directory = tmp_path_factory.mktemp("nearest")
    recipe = write_recipe(directory, NEAREST.format(symmetric=str(request.param).lower()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glmexport.workflows.build, "measure_and_report", lambda *_: None)
        (built,) = build(source, directory / "bundle", recipe)
    return Sample(source, recipe, built.directory, built, None)


@pytest.fixture
def convert(run: Run, nearest: Sample, tmp_path: Path) -> Callable[..., Any]:
    def call(*more: str | Path, bundle: Path = nearest.bundle, against: Path = nearest.checkpoint) -> Any:
        return run("convert", bundle, "--against", against, "--to", "gptq", "-o", tmp_path / "gptq", *more)

    return call


@pytest.mark.parametrize("layout", ["gptqmodel", "transformers"])
def test_what_is_written_is_read_back(
    nearest: Sample, convert: Callable[..., Any], tmp_path: Path, layout: str
) -> None:
    outcome = convert("--layout", layout, "--json")
    assert outcome.code == 0, outcome.stderr
    directory = tmp_path / "gptq"
    symmetric = read_manifest(nearest.bundle).matrices[0].symmetric
    settings = json.loads((directory / QUANTIZE_CONFIG).read_text(encoding="utf-8"))
    assert settings == outcome.document["quantization_config"]
    assert settings["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    written, weights = Original.open(str(directory), Silent()), bundle_weights(nearest.bundle, nearest.checkpoint)
    assert len(written.checkpoint.quantized) == 12
    # Ours are signed where the format is symmetric, and a reader must see the sign.
    assert bool((written.checkpoint.codes(GATE_UP, 0, 512).scales < 0).any()) == symmetric
    for key in written.checkpoint.quantized:
        linear = weights.quantized(key)
        assert linear is not None
        codes = written.checkpoint.codes(key, 0, linear.codes.shape[0])
        assert torch.equal(codes.codes, linear.codes) and torch.equal(codes.scales, linear.scales)
        assert linear.zero_points is None or torch.equal(codes.zero_points, linear.zero_points)
    stored, original = load_file(directory / WEIGHTS), load_file(nearest.checkpoint / WEIGHTS)
    assert any(".gate_proj." in name for name in stored) == (layout == "gptqmodel")
    for name in set(stored) & set(original):
        assert stored[name].dtype == original[name].dtype and torch.equal(stored[name], original[name])
    assert set(original) - set(stored) == set(written.checkpoint.quantized)
    assert {path.name for path in nearest.checkpoint.iterdir()} <= everything(directory)
    assert sum(tensor.nbytes for tensor in stored.values()) == outcome.document["bytes"]


def test_shards_are_indexed(nearest: Sample, tmp_path: Path) -> None:
    original = Original.open(str(nearest.checkpoint), Silent())
    weights = bundle_weights(nearest.bundle, nearest.checkpoint)
    whole = GptqCheckpoint(weights, original.checkpoint, original.architecture, "gptqmodel")
    whole.write(tmp_path / "one", original.tokenizer.files, Silent())
    whole.write(tmp_path / "many", original.tokenizer.files, Silent(), shard_bytes=64 << 10)
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    assert all((tmp_path / "many" / name).stat().st_size < 128 << 10 for name in shards)
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    assert set(one.tensors) == set(many.tensors)
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)


def test_exceptions_are_written_as_overrides(source: Path, tmp_path: Path, run: Run, quick: None) -> None:
    written = quantize(source, tmp_path / "gptq", **EXCEPTIONS)
    (built,) = build(written.directory, tmp_path / "bundle", "stored")
    outcome = run("convert", built.directory, "--against", written.directory, "--to", "gptq", "-o", tmp_path / "again")
    assert outcome.code == 0, outcome.stderr
    settings = json.loads((tmp_path / "again" / QUANTIZE_CONFIG).read_text(encoding="utf-8"))
    assert settings["dynamic"] == {
        rf"-:^{O_PROJ.removesuffix('.weight')}$".replace(".", r"\."): {},
        rf"+:^{DOWN.removesuffix('.weight')}$".replace(".", r"\."): {"bits": 8, "group_size": 64, "sym": False},
    }
    first, again = (Original.open(str(tmp_path / name), Silent()).checkpoint for name in ("gptq", "again"))
    assert set(first.tensors) == set(again.tensors) and dict(first.quantized) == dict(again.quantized)
    assert all(torch.equal(first.read(name), again.read(name)) for name in first.tensors)


class TestNothingIsLost:
    def test_what_exists_is_refused(self, convert: Callable[..., Any], tmp_path: Path) -> None:
        (tmp_path / "gptq").mkdir()
        (tmp_path / "gptq" / "precious").write_text("x", encoding="utf-8")
        check(convert(), EXIT_INPUT, "exists", "--force")
        check(convert("--force"), EXIT_INPUT, "is not a GPTQ checkpoint")
        assert everything(tmp_path / "gptq") == {"precious"}

    def test_a_checkpoint_is_replaced_when_asked(self, convert: Callable[..., Any], tmp_path: Path) -> None:
        assert convert().code == 0
        (tmp_path / "gptq" / "old").write_text("x", encoding="utf-8")
        assert convert("--force").code == 0
        assert "old" not in everything(tmp_path / "gptq")
        assert [path.name for path in tmp_path.iterdir()] == ["gptq"]

    def test_a_failure_leaves_nothing(
        self, convert: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("glmexport.assembly.gptq.save_file", fail)
        outcome = convert()
        assert outcome.code == 69 and "No space left" in outcome.stderr
        assert not everything(tmp_path)

    def test_another_original_is_refused(self, convert: Callable[..., Any], tmp_path: Path) -> None:
        small_checkpoint(tmp_path / "other", seed=1)
        check(convert(against=tmp_path / "other"), EXIT_INPUT, "was built from", "--against")

    def test_a_changed_bundle_is_refused(self, nearest: Sample, convert: Callable[..., Any], tmp_path: Path) -> None:
        copy = Path(shutil.copytree(nearest.bundle, tmp_path / "copy"))
        (copy / "genai_config.json").write_text("{}", encoding="utf-8")
        check(convert(bundle=copy), EXIT_INPUT, "genai_config.json", "not the file")


def test_a_bundle_in_full_precision_is_refused(source: Path, tmp_path: Path, run: Run, quick: None) -> None:
    (built,) = build(source, tmp_path / "bundle", "fp32")
    outcome = run("convert", built.directory, "--against", source, "--to", "gptq", "-o", tmp_path / "gptq")
    check(outcome, EXIT_INPUT, "full precision", "nothing to write")
