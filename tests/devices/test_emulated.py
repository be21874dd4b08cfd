"""arm64 under QEMU computes what this machine computes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from builds import Run, Sample
from components import emulated_arm64
from devices.conftest import PROMPTS, TEXTS

from glmexport.devices.answers import DeviceAnswers
from glmexport.devices.emulated import EMULATED, open_emulated, prepare
from glmexport.devices.local import LocalRunner
from glmexport.foundation.errors import InputError, MachineError
from glmexport.foundation.progress import Silent
from glmexport.report.document import read_report


@pytest.fixture(scope="module")
def machine() -> Path:
    return emulated_arm64()


def test_it_computes_what_this_machine_does(machine: Path, job: Path, tmp_path: Path) -> None:
    open_emulated(machine)(job, tmp_path / "arm64", Silent())
    LocalRunner()(job, tmp_path / "local", Silent())
    emulated, local = (DeviceAnswers.open(name, job, tmp_path / name) for name in ("arm64", "local"))
    facts = emulated.result.device
    assert facts.emulated == EMULATED and facts.system.endswith("aarch64") and "asimddp" in facts.instruction_sets
    assert emulated.result.speed is None and emulated.result.speed_absent_because == EMULATED
    for index in range(TEXTS):
        ours, theirs = (each._answer(index, "logits") for each in (local, emulated))
        distance = (ours - theirs).abs().amax(-1)
        # Where an activation is rounded to its other neighbour, all later positions of the text read it.
        assert float(distance[:3].max()) < 2e-5 and float(distance.max()) < 0.1
    tops = [torch.cat([each._answer(index, "top") for index in range(TEXTS)]) for each in (local, emulated)]
    assert float((tops[0] == tops[1]).double().mean()) > 0.95
    assert [emulated.tokens(index) for index in range(PROMPTS)] == [local.tokens(index) for index in range(PROMPTS)]


def test_the_report_says_what_it_is(machine: Path, sample: Sample, captured: Path, tmp_path: Path, run: Run) -> None:
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    policy = tmp_path / "policy.toml"
    policy.write_text(
        "kl_mean_nats = 0.5\nln_perplexity_ratio = 0.5\ntop1_agreement = 0.2\nminimum_positions = 1\n"
        "[performance]\nmin_decode_tokens_per_s = 1\n"
    )
    outcome = run(
        "validate", bundle, "--reference", captured, "--device", f"qemu-arm64:{machine}", "--policy", policy
    )  # fmt: skip
    report = read_report(bundle / "report.json")
    assert report.performance is None and report.performance_absent_because == EMULATED
    # A limit on speed is not kept by what has none.
    (decode,) = (gate for gate in report.gates if gate.name == "Decode")
    assert decode.verdict == "INCONCLUSIVE" and decode.sample == EMULATED and outcome.code == 2
    assert any("is not the device itself" in limit for limit in report.limits)
    for text in (outcome.stderr, (bundle / "report.md").read_text(), (bundle / "report.html").read_text()):
        assert "correctness only" in text


def test_without_its_files_it_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no files of an emulated arm64 machine") as error:
        open_emulated(tmp_path)
    assert error.value.next_step.startswith("Make them with: glmexport devices prepare qemu-arm64")
    with pytest.raises(InputError, match="exists"):
        prepare(tmp_path, Silent())


def test_a_failed_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MachineError, match="apt-get cannot be run"):
        prepare(tmp_path / "machine", Silent())
    assert list(tmp_path.iterdir()) == []
