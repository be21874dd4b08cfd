"""Bundles for hardware that this machine is not: written, compared number by number, run if the provider is here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builds import RECIPE, Run, Sample, session, small_checkpoint, write_recipe, write_target
from models import MIXTURE

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.loop import FixedLoopConfig, read_loop
from glmexport.bundle.manifest import read_manifest
from glmexport.engine.core.cache import cache_specs
from glmexport.engine.core.graphs import FixedGraph
from glmexport.engine.generation import GenerationSession
from glmexport.engine.graph_opening import fixed_names
from glmexport.foundation.errors import EXIT_INCONCLUSIVE, EXIT_INPUT
from glmexport.foundation.host import CPU_PROVIDER, Host
from glmexport.foundation.target import open_target, shipped_targets

AVX2 = Host("x86_64", frozenset({"avx2", "fma"}))
#: With this provider and native, bundles of another class run here.
BY_CPU = [target.name for target in shipped_targets() if target.provider.name == CPU_PROVIDER]
ELSEWHERE = [target.name for target in shipped_targets() if target.provider.name != CPU_PROVIDER]
SYMMETRIC = RECIPE.replace("[linears]\nbits = 4", "[linears]\nsymmetric = true\nbits = 4").replace(
    "[lm_head]\nbits = 8", "[lm_head]\nsymmetric = true\nbits = 8"
)


@pytest.fixture(autouse=True)
def on_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "this", classmethod(lambda cls: AVX2))


def greedy(bundle: Path, prompt: list[int], count: int) -> list[int]:
    """model.onnx with a growing cache of whatever type it has."""
    runtime = session(bundle, "model.onnx")
    caches = [value for value in runtime.get_inputs() if value.name.startswith("past")]
    past = [spec.array(spec.empty(1, 0)) for spec in cache_specs(runtime, {value.name: "" for value in caches})]
    names = ["logits", *(value.name for value in runtime.get_outputs() if value.name.startswith("present"))]
    ids, length, tokens = prompt, len(prompt), []
    for _ in range(count):
        feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, length), np.int64)}
        logits, *past = runtime.run(names, feeds | {v.name: held for v, held in zip(caches, past, strict=True)})
        tokens.append(int(logits[0, -1].argmax()))
        ids, length = tokens[-1:], length + 1
    return tokens


def answered(bundle: Path, ids: list[int]) -> np.ndarray:
    """Logits behind ``ids`` of model.onnx, from empty caches of whatever type and shape it has."""
    runtime, loop = session(bundle, "model.onnx"), read_loop(bundle)
    if isinstance(loop, FixedLoopConfig):
        graph = FixedGraph(runtime, fixed_names(loop, runtime))
        return graph.run(graph.begin(), ids, 0)
    feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    past = {value.name: "" for value in runtime.get_inputs() if value.name.startswith("past")}
    feeds |= {spec.input: spec.array(spec.empty(1, 0)) for spec in cache_specs(runtime, past)}
    (logits,) = runtime.run(["logits"], feeds)
    return logits


def recipe_for(name: str, directory: Path) -> Path:
    signed = open_target(name).weights.symmetric_only
    return write_recipe(directory, SYMMETRIC if signed else RECIPE, "signed" if signed else "small")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_target_that_is_not_here(run: Run, sample: Sample, tmp_path: Path, name: str) -> None:
    out = tmp_path / "bundle"
    recipe = recipe_for(name, tmp_path)
    outcome = run("build", sample.checkpoint, "--target", name, "--recipe", recipe, "-o", out, "--threads", 1, "--json")
    assert outcome.code == EXIT_INCONCLUSIVE, outcome.stderr
    assert "not run on the device" in outcome.stderr and "Validate it where" in outcome.stderr
    (document,) = outcome.document["bundles"]
    assert document["report"] is None and document["verdict"] == "INCONCLUSIVE" and document["not_run"]
    gates = {gate["name"]: gate["verdict"] for gate in document["gates"]}
    assert gates["Runs on the target's provider"] == "INCONCLUSIVE"
    assert gates["Tensors that were changed"] == "PASS"
    assert not (out / "report.json").exists()
    manifest = read_manifest(out)
    assert manifest.target == open_target(name)
    # The CPU provider has kernels for all of these forms, so that it can tell whether the graph is right.
    logits, expected = answered(out, [3, 4, 5]), answered(sample.bundle, [3, 4, 5])
    assert logits.dtype == np.float32
    # Another recipe, or another arithmetic, of the same weights.
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.95
    again = run("validate", out, "--against", sample.checkpoint, "--threads", 1)
    assert again.code == 69 and "targets probe" in again.stderr and open_target(name).provider.package in again.stderr
    check = run("targets", "check", out)
    assert check.code == 1 and "cannot run here" in check.stderr


@pytest.mark.parametrize("name", [name for name in BY_CPU if not name.startswith("x86")])
def test_a_target_whose_provider_is_here(run: Run, sample: Sample, tmp_path: Path, name: str) -> None:
    out = tmp_path / "bundle"
    outcome = run(
        "build", sample.checkpoint, "--target", name, "--recipe", sample.recipe, "-o", out, "--threads", 1, "--json"
    )
    report = outcome.document["bundles"][0]["report"]
    gates = {gate["name"]: gate for gate in report["gates"]}
    assert gates["Runs on the target's hardware"]["verdict"] == "WARN"
    assert f"another class of hardware than {name}" in gates["Runs on the target's hardware"]["sample"]
    assert report["verdict"] != "PASS"
    assert report["fidelity"]["overall"]["positions"] > 0


def test_its_own_hardware_is_no_remark(sample: Sample) -> None:
    assert not any("hardware" in gate.name for gate in sample.built.report.gates)


def test_what_cannot_be_built(run: Run, sample: Sample, tmp_path: Path) -> None:
    def refused(
        *words: str, target: object, checkpoint: Path = sample.checkpoint, recipe: Path = sample.recipe
    ) -> None:
        arguments = ("--target", str(target), "--recipe", recipe, "-o", tmp_path / "bundle", "--threads", 1)
        outcome = run("build", checkpoint, *arguments)
        assert outcome.code == EXIT_INPUT, outcome.stderr
        assert all(word in outcome.stderr for word in words), outcome.stderr
        assert not (tmp_path / "bundle").exists()

    refused("with zero points", "w4g128-sym-head", target="trt-rtx")
    lines = {"packed_qkv = true": 'packed_qkv = true\nkv_cache = "int8"'}
    int8 = write_target(tmp_path, lines, "int8")
    nearest = RECIPE.partition("[solver]")[0] + '[solver]\nmethod = "round-to-nearest"\n'
    refused("no calibration text", target=int8, recipe=write_recipe(tmp_path, nearest, "nearest"))
    small_checkpoint(tmp_path / "latent", "glm4_moe_lite")
    refused("caches latents", "latent_cache = false", target=int8, checkpoint=tmp_path / "latent")
    small_checkpoint(tmp_path / "experts", "glm4_moe", **MIXTURE)
    refused("mixture of experts", target="webgpu", checkpoint=tmp_path / "experts")
    refused("fixed shapes", "mixture of experts", "targets list", target="qnn", checkpoint=tmp_path / "experts")
    refused("fixed shapes", "latent attention", "targets list", target="qnn", checkpoint=tmp_path / "latent")
    lines = {"packed_qkv = true": 'packed_qkv = true\nstatic_shapes = true\nkv_cache = "int8"'}
    refused("fixed shapes", "cache in int8", target=write_target(tmp_path, lines, "fixed"))
    limits = {"[gates]": '[memory]\nmax_tensor_bytes = "20KiB"\n\n[gates]'}
    refused("embed_tokens", "max_tensor_bytes", target=write_target(tmp_path, limits, "narrow"))
    limits = {"[gates]": '[memory]\nmax_weight_bytes = "40KiB"\n\n[gates]'}
    refused("holds", "smaller checkpoint", target=write_target(tmp_path, limits, "little"))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_cache_in_its_loop(run: Run, sample: Sample, tmp_path: Path, kind: str) -> None:
    """onnxruntime-genai holds it, and generates what the graph computes."""
    lines = {"packed_qkv = true": f'packed_qkv = true\nkv_cache = "{kind}"', "accuracy_level = 4": "accuracy_level = 0"}
    target = write_target(tmp_path, lines, kind)
    out = tmp_path / "bundle"
    arguments = ("--target", target, "--recipe", sample.recipe, "-o", out, "--threads", 1, "--json")
    report = run("build", sample.checkpoint, *arguments).document["bundles"][0]["report"]
    assert report["fidelity"]["overall"]["kl_mean_nats"] < 0.05
    cache = read_manifest(out).cache
    assert cache is not None and (cache.format, cache.scales) == (kind, "channel") and cache.tokens > 0
    assert not (out / "calibration.onnx").exists()
    prompt = list(range(30, 60))
    expected = greedy(out, prompt, 16)
    found = GenerationSession.open(Bundle.open(out), 1).tokens(prompt, 16)
    assert found == expected[: len(found)] and len(found) > 4
    # A device's program holds such caches too.
    again = run("validate", out, "--against", sample.checkpoint, "--device", "local", "--threads", 1, "--json")
    (device,) = again.document["devices"]
    assert device["fidelity"]["overall"]["kl_mean_nats"] == pytest.approx(
        report["fidelity"]["overall"]["kl_mean_nats"], rel=0.02
    )
