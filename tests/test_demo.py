"""The embedded demo checkpoint, end to end: what the product claims, on a model that was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from builds import Run, carried, run
from components import emulated_arm64, require_browser

from glmexport.bundle.bundle import Bundle
from glmexport.calibration.corpus import shipped_documents
from glmexport.engine.text import generate
from glmexport.foundation.machine import cores
from glmexport.foundation.progress import Silent
from glmexport.foundation.target import HOST, open_target
from glmexport.report.document import read_report
from glmexport.results.record import Verdict
from glmexport.validation.conditions import ValidationPlan
from glmexport.workflows.build import build
from glmexport.workflows.job import jobs_of
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions, Built

__all__ = ["run"]
pytestmark = pytest.mark.slow
#: Targets of devices that this machine can be, in a browser and under emulation.
ELSEWHERE = ("wasm", "arm64")
#: Less text than a real build takes, so that the builds fit a test run.
CALIBRATION_TOKENS = 16384
PLAN = ValidationPlan(positions_per_language=400, prompt_tokens=16, generated_tokens=8, speed_seconds=0, behaviour=None)


@pytest.fixture(scope="module")
def original() -> Original:
    return Original.open("demo", Silent())


def build_demo(original: Original, name: str, folder: Path, *targets: str) -> list[Built]:
    """Bundles of one quantization, in order of ``targets``."""
    jobs = jobs_of(original, [open_target(target) for target in targets], name, folder / name)
    if calibration := jobs[0].recipe.calibration:
        plan = calibration.model_copy(update={"tokens": CALIBRATION_TOKENS})
        jobs = [replace(job, recipe=job.recipe.model_copy(update={"calibration": plan})) for job in jobs]
    built = build(original, jobs, BuildOptions(threads=cores(), validation=PLAN), Silent())
    assert all(isinstance(one, Built) for one in built)
    return [one for one in built if isinstance(one, Built)]


@pytest.fixture(scope="module")
def bundles(original: Original, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """By target; for this host by recipe."""
    folder = tmp_path_factory.mktemp("bundles")
    here, *elsewhere = build_demo(original, "w4g32", folder, HOST, *ELSEWHERE)
    (nearest,) = build_demo(original, "rtn-w4g32", folder, HOST)
    return {"w4g32": here, "rtn-w4g32": nearest, **dict(zip(ELSEWHERE, elsewhere, strict=True))}


def ratios(built: Built, nearest: Built) -> dict[str, float]:
    """Divergence by language, as a share of that of round-to-nearest."""
    of = {row.language: row.kl_mean_nats for row in nearest.report.fidelity.languages}
    return {row.language: row.kl_mean_nats / of[row.language] for row in built.report.fidelity.languages}


def test_gptq_halves_the_divergence_of_round_to_nearest_in_every_language(bundles: dict[str, Built]) -> None:
    found = ratios(bundles["w4g32"], bundles["rtn-w4g32"])
    assert len(found) >= 19 and max(found.values()) <= 0.5, found


@pytest.mark.release
def test_it_does_so_in_groups_of_128(original: Original, tmp_path: Path) -> None:
    (built,), (nearest,) = (build_demo(original, name, tmp_path, HOST) for name in ("w4g128", "rtn-w4g128"))
    found = ratios(built, nearest)
    assert len(found) >= 19 and max(found.values()) <= 0.5, found


def test_the_parts_of_the_divergence_are_told_apart(bundles: dict[str, Built]) -> None:
    report = bundles["w4g32"].report
    linears, head, runtime = (share.kl_mean_nats for share in report.shares)
    assert linears > 10 * abs(head)
    assert linears > 5 * abs(runtime)


def test_default_gates_pass_and_the_report_reads_back(bundles: dict[str, Built]) -> None:
    built = bundles["w4g32"]
    # The enough-text gate is about the short plan of this test, not about the bundle.
    assert all(gate.verdict is Verdict.PASS for gate in built.report.gates if gate.unit != "positions")
    # As text: an error that was not measured is not a number, and that equals nothing, itself included.
    assert read_report(built.directory / "report.json").model_dump_json() == built.report.model_dump_json()
    calibration = built.report.calibration
    assert calibration is not None
    assert (calibration.overlap.shared_documents, calibration.overlap.shared_lines) == (0, 0)


@pytest.mark.parametrize("language", ["zh", "en", "ja", "uk", "sw"])
def test_genai_and_onnxruntime_generate_the_same_tokens(
    bundles: dict[str, Built], original: Original, language: str
) -> None:
    directory = bundles["w4g32"].directory
    tokenizer = original.tokenizer
    (text, *_) = (document.text for document in shipped_documents("evaluation", [language]))
    prompt = tokenizer.prefix + tokenizer.encode(text)[:24]
    expected = greedy(directory, prompt, 64)
    ends = json.loads((directory / "genai_config.json").read_text())["model"]["eos_token_id"]
    cut = next((index for index, token in enumerate(expected) if token in ends), len(expected))
    pieces = list(generate(Bundle.open(directory), prompt, max_tokens=64, threads=cores()))
    assert [piece.token for piece in pieces] == expected[:cut]


@pytest.mark.parametrize("target", ELSEWHERE)
def test_a_device_of_the_targets_class_gives_the_originals_answers(
    bundles: dict[str, Built], run: Run, target: str
) -> None:
    """In a real browser, and under emulation, on a few positions of every language."""
    if target == "wasm":
        require_browser()
        device = "browser"
    else:
        device = f"qemu-arm64:{emulated_arm64()}"
    directory = bundles[target].directory
    outcome = run("validate", directory, "--against", "demo", "--device", device, "--positions", 24)
    (answered,) = read_report(directory / "report.json").devices
    assert answered.fidelity is not None, outcome.stderr
    # So little text decides nothing, but it may not contradict the limits.
    assert answered.verdict is not Verdict.BLOCK, outcome.stderr
    limits, languages = open_target(target).gates, answered.fidelity.languages
    assert len(languages) >= 19 and answered.fidelity.overall.positions >= 300
    assert max(row.kl_mean_nats for row in languages) < limits.kl_mean_nats
    # Other kernels of the same arithmetic: what they add is small beside what 4 bits do.
    here = bundles[target].report.fidelity.overall.kl_mean_nats
    assert answered.fidelity.overall.kl_mean_nats == pytest.approx(here, rel=0.5)


def greedy(directory: Path, prompt: list[int], steps: int) -> list[int]:
    """A plain decode loop over model.onnx."""
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    caches = [value for value in session.get_inputs() if value.name.startswith("past")]
    past = [np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in caches]
    ids, length, tokens = np.array([prompt]), len(prompt), []
    for _ in range(steps):
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64)}
        feeds |= {value.name: cache for value, cache in zip(caches, past, strict=True)}
        logits, *past = session.run(carried(session), feeds)
        tokens.append(int(logits[0, -1].argmax()))
        ids, length = np.array([[tokens[-1]]]), length + 1
    return tokens
