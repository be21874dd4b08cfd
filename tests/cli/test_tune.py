"""``glmexport tune``: a target file with the fastest legal settings and its evidence, or why the start stays.

Sides are timed in one test; in the others their seconds are known, so that the choice does not depend on the machine.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from builds import TARGET, Run, Sample, build, small_checkpoint, write_target
from gptq_files import quantize
from safetensors.torch import load_file, save_file

import glmexport.workflows.tune
from glmexport.foundation.errors import EXIT_INPUT, EXIT_INTERRUPTED
from glmexport.foundation.evidence import Evidence
from glmexport.foundation.target import open_target
from glmexport.tuning.measure import Times
from glmexport.tuning.streams import ArithmeticStreams

SPINNING = "session.intra_op.allow_spinning"
FEW = (
    "--target", TARGET, "--recipe", "w4g32", "--kv-cache", "activations", "--threads", "2", "--positions", "4",
    "--seconds", "0",
)  # fmt: skip
CORES = 1


class Side:
    """Seconds by what the bundle is called, which says how it was lowered, and by its session."""

    seconds: Callable[[str, dict[str, Any]], float]

    def __init__(self, bundles: list[Path], threads: int, *_: object) -> None:
        (bundle,) = bundles
        config = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))
        options = config["model"]["decoder"]["session_options"]
        assert options["intra_op_num_threads"] == threads
        self.taken = type(self).seconds(bundle.name, options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def take(self) -> Times:
        return Times(self.taken, self.taken, self.taken)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One core, and text of two languages."""
    monkeypatch.setattr("glmexport.foundation.machine.cores", lambda: CORES)
    documents = glmexport.workflows.tune.evaluation_documents

    def few(*arguments: Any) -> list[Any]:
        every = documents(*arguments)
        return [next(document for document in every if document.language == language) for language in ("en", "zh")]

    monkeypatch.setattr(glmexport.workflows.tune, "evaluation_documents", few)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, dict[str, Any]], float]], None]:
    def known(function: Callable[[str, dict[str, Any]], float]) -> None:
        monkeypatch.setattr(Side, "seconds", staticmethod(function), raising=False)
        monkeypatch.setattr(glmexport.workflows.tune, "Side", Side)

    return known


def split_is_faster(name: str, options: dict[str, Any]) -> float:
    return (0.5 if "split" in name else 1.0) * (0.8 if options.get(SPINNING) == "0" else 1.0) * (
        4.0 if "level-0" in name else 1.0
    )  # fmt: skip


def test_the_fastest_settings_become_a_target(
    sample: Sample, run: Run, tmp_path: Path, seconds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seconds(split_is_faster)
    outcome = run("tune", sample.checkpoint, *FEW, "--json")
    assert outcome.code == 0, outcome.stderr
    document = outcome.document
    assert document["target"] == f"{TARGET}-tuned.toml"
    assert document["chosen"]["packed_qkv"] is False and document["chosen"]["session"] == {SPINNING: "0"}
    assert "2.50 times the start's speed" in outcome.stderr and "split QKV" in outcome.stderr
    # Nothing else is left.
    assert [path.name for path in tmp_path.iterdir()] == [f"{TARGET}-tuned.toml"]

    tuned, start = open_target(f"{TARGET}-tuned.toml"), open_target(TARGET)
    assert tuned.name == f"{TARGET}-tuned" and not tuned.graph.packed_qkv
    assert tuned.session.config == {SPINNING: "0"} and tuned.weights.accuracy_level == 4
    assert (tuned.gates, tuned.probe, tuned.weights) == (start.gates, start.probe, start.weights)
    assert "2.50 times" in tuned.provenance.notes and "ONNX Runtime" in tuned.provenance.measured_on
    evidence = tuned.evidence
    assert evidence is not None and evidence == Evidence.model_validate(document["evidence"])
    assert evidence.checkpoint_digest.startswith("sha256:") and evidence.libraries["onnxruntime"]
    # Fused or split, int8 or fp32, spinning or not, one thread or all.
    assert len(evidence.candidates) == 2 * 2 * 2 * 2
    outcomes = [each.outcome for each in evidence.candidates]
    assert outcomes[0] == "start" and outcomes.count("chosen") == 1
    assert all(each.reason and each.divergence for each in evidence.candidates)
    assert all(each.gains for each in evidence.candidates[1:])
    assert evidence.confirmed is not None and evidence.confirmed.preferred.lower == pytest.approx(2.5)

    shown = run("targets", "show", f"{TARGET}-tuned.toml")
    assert shown.code == 0 and "evidence.verdict" in shown.stderr and "candidates" not in shown.stderr


def test_a_bundle_runs_in_the_tuned_session(sample: Sample, run: Run, tmp_path: Path, seconds: Any) -> None:
    seconds(lambda name, options: 0.5 if options["intra_op_num_threads"] == 2 and SPINNING in options else 1.0)
    path = tmp_path / "edge.toml"
    outcome = run("tune", sample.checkpoint, *FEW, "-o", path)
    assert outcome.code == 0, outcome.stderr
    (built,) = build(sample.checkpoint, tmp_path / "bundle", sample.recipe, (str(path),))
    assert built.manifest.target.session.threads == 2
    config = json.loads((tmp_path / "bundle" / "genai_config.json").read_text(encoding="utf-8"))
    options = config["model"]["decoder"]["session_options"]
    assert options["intra_op_num_threads"] == 2 and options[SPINNING] == "0"
    answer = run("run", tmp_path / "bundle", "-p", "x", "--max-tokens", "2")
    assert answer.code == 0 and facts(answer.stderr)["threads"] == "2"
    # Who names a number gets it.
    answer = run("run", tmp_path / "bundle", "-p", "x", "--max-tokens", "2", "--threads", "1")
    assert facts(answer.stderr)["threads"] == "1"


def facts(text: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(" ") for line in text.splitlines())}


def test_nothing_is_faster(sample: Sample, run: Run, tmp_path: Path, seconds: Any) -> None:
    def start_is_best(name: str, options: dict[str, Any]) -> float:
        return 1.0 if "level-4-fused" in name and options["intra_op_num_threads"] == CORES else 1.1

    seconds(start_is_best)
    path = tmp_path / "edge.toml"
    outcome = run("tune", sample.checkpoint, *FEW, "-o", path, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.document["chosen"] is None and "Nothing legal was surely faster" in outcome.stderr
    tuned, start = open_target(str(path)), open_target(TARGET)
    same = {"name": start.name, "provenance": start.provenance, "evidence": None}
    assert tuned.model_copy(update=same) == start
    assert tuned.evidence is not None and "Nothing legal" in tuned.evidence.verdict


def write_massive(directory: Path, factor: float = 3000.0) -> None:
    """Some channels of the normed stream are huge, and the matrices that read them make up for it."""
    small_checkpoint(directory)
    tensors = load_file(directory / "model.safetensors")
    channels = torch.arange(5, 128, 32)
    for key, value in tensors.items():
        if key.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            value[channels] *= factor
        elif key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_up_proj.weight")):
            value[:, channels] /= factor
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_int8_is_refused_where_it_diverges_too_far(run: Run, tmp_path: Path, seconds: Any) -> None:
    seconds(split_is_faster)
    write_massive(tmp_path / "checkpoint")
    path = tmp_path / "edge.toml"
    outcome = run("tune", tmp_path / "checkpoint", *FEW, "-o", path, "--json")
    assert outcome.code == 0, outcome.stderr
    assert "w4g32 at accuracy_level 4 is left out: its arithmetic moves" in outcome.stderr
    chosen = outcome.document["chosen"]
    # Four times slower than the start, and legal.
    assert chosen["accuracy_level"] == 0 and chosen["packed_qkv"] is False
    evidence = open_target(str(path)).evidence
    assert evidence is not None and "start is not legal" in evidence.verdict
    assert "above the allowance" in evidence.verdict
    assert evidence.confirmed is not None and evidence.confirmed.preferred.ratio < 1
    for each in evidence.candidates[1:]:
        assert (each.outcome == "illegal") == (each.settings.accuracy_level == 4)
        assert (each.gains is None) == (each.settings.accuracy_level == 4)
    assert open_target(str(path)).weights.accuracy_level == 0


def test_a_larger_allowance_lets_it_pass(sample: Sample, run: Run, tmp_path: Path, seconds: Any) -> None:
    seconds(split_is_faster)
    strict = run("tune", sample.checkpoint, *FEW, "-o", tmp_path / "a.toml", "--allowance", "1e-6", "--json")
    levels = {each["settings"]["accuracy_level"] for each in candidates(strict.document, "illegal")}
    assert levels == {4} and strict.document["chosen"]["accuracy_level"] == 0
    loose = run("tune", sample.checkpoint, *FEW, "-o", tmp_path / "b.toml", "--json")
    assert not candidates(loose.document, "illegal") and loose.document["chosen"]["accuracy_level"] == 4


def candidates(document: Any, outcome: str) -> list[Any]:
    return [each for each in document["evidence"]["candidates"] if each["outcome"] == outcome]


def test_stored_codes_leave_no_choice_of_formats(sample: Sample, run: Run, tmp_path: Path, seconds: Any) -> None:
    seconds(split_is_faster)
    written = quantize(sample.checkpoint, tmp_path / "gptq")
    few = [part for part in FEW if part not in ("--recipe", "w4g32")]
    path = tmp_path / "edge.toml"
    outcome = run("tune", written.directory, *few, "-o", path, "--json")
    assert outcome.code == 0, outcome.stderr
    assert {each["settings"]["recipe"] for each in outcome.document["evidence"]["candidates"]} == {"stored"}
    # The target is for other checkpoints too.
    tuned = open_target(str(path))
    assert tuned.weights.default_recipe == "w4g32" and not tuned.graph.packed_qkv
    refused = run("tune", written.directory, *FEW, "-o", tmp_path / "other.toml")
    assert refused.code == EXIT_INPUT and "quantized already" in refused.stderr


def test_nothing_is_overwritten_unless_asked(sample: Sample, run: Run, tmp_path: Path, seconds: Any) -> None:
    seconds(split_is_faster)
    path = tmp_path / "edge.toml"
    path.write_text("mine", encoding="utf-8")
    refused = run("tune", sample.checkpoint, *FEW, "-o", path)
    assert refused.code == EXIT_INPUT and "edge.toml exists" in refused.stderr and "--force" in refused.stderr
    assert path.read_text(encoding="utf-8") == "mine" and len(list(tmp_path.iterdir())) == 1
    assert run("tune", sample.checkpoint, *FEW, "-o", path, "--force").code == 0
    assert tomllib.loads(path.read_text(encoding="utf-8"))["session"]


@pytest.mark.parametrize(
    "options,message",
    [
        (("-o", "edge.json"), "is no .toml file"),
        (("--recipe", "w4g23"), "There is no recipe named 'w4g23'"),
        (("--session-config", "session.x"), "write KEY=VALUE,VALUE"),
        (("--provider-option", "=1,2"), "write KEY=VALUE,VALUE"),
        (("--target", "x87"), "There is no target named 'x87'"),
        (("--allowance", "0"), "--allowance"),
        (("--recipe", "w8g128", "--target", "four.toml"), "has no kernels"),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_measured(
    options: tuple[str, ...], message: str, sample: Sample, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_target(tmp_path, {"bits = [2, 4, 8]": "bits = [4]"}, "four")
    monkeypatch.setattr(glmexport.workflows.tune, "reference_states", lambda *_, **__: pytest.fail("measured"))
    outcome = run("tune", sample.checkpoint, *options)
    assert outcome.code == EXIT_INPUT and message in outcome.stderr.replace("\n", " "), outcome.stderr
    assert "Traceback" not in outcome.stderr and [path.name for path in tmp_path.iterdir()] == ["four.toml"]


def test_goes_on_after_an_interruption(
    sample: Sample, run: Run, tmp_path: Path, seconds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = 0

    def interrupted(name: str, options: dict[str, Any]) -> float:
        nonlocal turns
        turns += 1
        if turns > 5:
            raise KeyboardInterrupt
        return split_is_faster(name, options)

    seconds(interrupted)
    path = tmp_path / "edge.toml"
    outcome = run("tune", sample.checkpoint, *FEW, "-o", path)
    assert outcome.code == EXIT_INTERRUPTED and "same command again" in outcome.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".glmexport-work-") and len(list(left.glob("first-*.json"))) == 4
    # Neither the divergence nor what was timed is measured again.
    monkeypatch.setattr(ArithmeticStreams, "_run", lambda *_: pytest.fail("computed again"))
    loaded = []

    def counted(name: str, options: dict[str, Any]) -> float:
        loaded.append(name)
        return split_is_faster(name, options)

    seconds(counted)
    outcome = run("tune", sample.checkpoint, *FEW, "-o", path, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.document["chosen"]["packed_qkv"] is False
    assert list(tmp_path.iterdir()) == [path] and loaded


@pytest.mark.slow
def test_on_this_machine(sample: Sample, run: Run, tmp_path: Path) -> None:
    """In real processes, with weights that GPTQ made; whatever is found, it is consistent."""
    path = tmp_path / "edge.toml"
    options = ["--target", TARGET, "--recipe", str(sample.recipe), "--threads", "1", "--positions", "8"]
    options += ["--kv-cache", "activations"]
    options += ["--seconds", "0", "--prompt-tokens", "16", "--calibrated", "--prefer", "decode"]
    target = write_target(tmp_path, {'default_recipe = "w4g32"': f'default_recipe = "{sample.recipe}"'}, "start")
    options[1] = str(target)
    outcome = run("tune", sample.checkpoint, *options, "-o", path, "--json")
    assert outcome.code == 0, outcome.stderr
    evidence = open_target(str(path)).evidence
    assert evidence is not None and evidence.weights == "gptq" and evidence.prefer == "decode"
    assert evidence.timed == "all 2 blocks" and evidence.prompt_tokens == (8, 16)
    timed = [each for each in evidence.candidates if each.gains]
    assert timed and all(each.gains and each.gains.decode.ratio > 0 for each in timed)
    chosen = [each for each in evidence.candidates if each.outcome == "chosen"]
    assert len(chosen) == (outcome.document["chosen"] is not None)
    if chosen:
        assert evidence.confirmed is not None and evidence.confirmed.preferred.sure
