"""Several devices side by side: one report, the worst verdict, and nobody who dies takes others with them."""

from __future__ import annotations

import shutil
import threading
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from builds import QUICK, Run, Sample
from sshd import Sshd

from glmexport.devices.fleet import Member, ask, open_device, open_fleet
from glmexport.devices.local import LocalRunner
from glmexport.devices.ssh import SshRunner
from glmexport.foundation.errors import EXIT_INPUT, EXIT_MACHINE, DefinitionError, InputError, MachineError
from glmexport.foundation.progress import Progress, Silent
from glmexport.report.document import read_report
from glmexport.results.record import Verdict
from glmexport.validation.conditions import BehaviourPlan
from glmexport.wire.ssh import SshAddress


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_fleet_file(tmp_path: Path) -> None:
    text = """
    [devices.edge]
    at = "ssh://me@edge:2222"
    class = "arm-edge"
    key = "keys/edge"
    known_hosts = "known_hosts"
    python = "venv/bin/python"
    work = "/data/work"
    reconnects = 2
    silence = 60
    [devices.here]
    at = "local"
    """
    edge, here = open_fleet(write(tmp_path / "fleet.toml", text))
    assert edge.runner == SshRunner(
        SshAddress("edge", "edge", "me", 2222, tmp_path / "keys/edge", tmp_path / "known_hosts"),
        python="venv/bin/python", work="/data/work", reconnects=2, silence=60,
    )  # fmt: skip
    assert (edge.device_class, here.device_class, here.name) == ("arm-edge", "here", "here")
    assert isinstance(here.runner, LocalRunner) and here.here and not edge.here


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "devices"),
        ("[devices]", "devices"),
        ("[devices.a]\nat = 'local'\nspeed = 1", "devices.a.speed"),
        ("[devices.a]\nat = 'local'\nkey = 'x'", "key belongs to devices at ssh"),
        ("[devices.a]\nat = 'ssh://x'\nreconnects = -1", "devices.a.reconnects"),
        ("[devices.a]\nat = 'ssh://x'\nsilence = 0", "devices.a.silence"),
        ("[devices.a]\nat = 'telnet://x'", "no kind of device"),
        ("[devices.a", "is not TOML"),
    ],
)
def test_a_fleet_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_fleet(write(tmp_path / "fleet.toml", text))


def test_no_fleet_file(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match="There is no fleet file"):
        open_fleet(tmp_path / "none.toml")
    with pytest.raises(InputError, match="no files of an emulated arm64 machine"):
        open_device(f"qemu-arm64:{tmp_path}")


def member(name: str, runner: object) -> Member:
    return Member(name, name, runner)  # type: ignore[arg-type]


def test_whoever_dies_dies_alone(tmp_path: Path) -> None:
    finished = []

    def well(job: Path, results: Path, progress: Progress) -> None:
        with progress.track("Texts", 2) as track:
            track.advance(2)
        finished.append(results)

    def dies(job: Path, results: Path, progress: Progress) -> None:
        raise MachineError("edge burned down.", next_step="Call somebody.")

    progress = Silent()
    members = [member("a/b", well), member("dead", dies), member("a_b", well)]
    failures = ask(members, tmp_path, tmp_path / "results", progress)
    assert list(failures) == ["dead"] and len(set(finished)) == 2
    assert progress.remarks == ["edge burned down. Call somebody."]


def test_a_bug_ends_all(tmp_path: Path) -> None:
    ended = threading.Event()

    def waits(job: Path, results: Path, progress: Progress) -> None:
        try:
            with progress.track("Texts", 1) as track:
                while True:
                    time.sleep(0.01)
                    track.advance(0)
        finally:
            ended.set()

    def bug(job: Path, results: Path, progress: Progress) -> None:
        raise ZeroDivisionError

    # Those on this machine take turns, which a bug does not wait for.
    class Remote(SshRunner):
        def __call__(self, job: Path, results: Path, progress: Progress) -> None:
            waits(job, results, progress)

    with pytest.raises(ZeroDivisionError):
        members = [member("waits", Remote(SshAddress("x", "x"))), member("bug", bug)]
        ask(members, tmp_path, tmp_path / "results", Silent())
    assert ended.is_set()


def test_one_report_of_all(
    sample: Sample, captured: Path, sshd: Sshd, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("asyncssh", reason="the extra 'devices' is not installed")
    runner = sshd.runner(tmp_path / "work")
    fleet = write(
        tmp_path / "fleet.toml",
        f"""
        [devices.here]
        at = "local"
        class = "x86"
        [devices.lab]
        at = "ssh://{runner.address.user}@127.0.0.1:{sshd.port}"
        class = "x86"
        key = "{sshd.key}"
        known_hosts = "{sshd.known_hosts}"
        python = "{runner.python}"
        work = "{runner.work}"
        [devices.stranger]
        at = "ssh://me@127.0.0.1:{sshd.port}"
        known_hosts = "{write(tmp_path / "empty", "")}"
        """,
    )
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    outcome = run("validate", bundle, "--reference", captured, "--fleet", fleet)
    assert outcome.code == 2
    report = read_report(bundle / "report.json")
    here, lab, stranger = report.devices
    assert here.fidelity == lab.fidelity and here.performance and lab.performance
    assert stranger.failure and "is refused" in stranger.failure and stranger.verdict is Verdict.INCONCLUSIVE
    assert report.detailed == "here" and report.fidelity == here.fidelity
    assert "Nothing was measured on stranger." in report.limits
    for text in (outcome.stderr, (bundle / "report.md").read_text(), (bundle / "report.html").read_text()):
        assert "here, lab" in text and "no answer" in text and "stranger did not answer" in text
    suites = ET.parse(bundle / "report.xml").getroot()
    assert [suite.get("name") for suite in suites] == [f"bundle on {name}" for name in ("here", "lab", "stranger")]
    assert suites[2].get("errors") == "1"
    assert suites.get("tests") == str(len(here.gates) + len(lab.gates) + 1)
    # What answered is kept until all have, so that the next run has little to do; then nothing is left.
    assert (tmp_path / ".bundle.devices").is_dir()
    fleet.write_text(fleet.read_text().partition("[devices.stranger]")[0])
    assert run("validate", bundle, "--reference", captured, "--fleet", fleet).code == 2
    assert read_report(bundle / "report.json").devices[0].performance == here.performance
    assert not (tmp_path / ".bundle.devices").exists()


def test_a_device_judges_as_this_process_does(sample: Sample, captured: Path, tmp_path: Path, run: Run) -> None:
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    run("validate", bundle, "--reference", captured, "--threads", 1)
    process = read_report(bundle / "report.json")
    run("validate", bundle, "--reference", captured, "--threads", 1, "--device", "local")
    device = read_report(bundle / "report.json")
    for ours, theirs in zip(process.fidelity.languages, device.fidelity.languages, strict=True):
        assert theirs.kl_mean_nats == pytest.approx(ours.kl_mean_nats, rel=1e-4)
        assert theirs.top1_agreement == ours.top1_agreement
    assert device.fidelity.capture and process.fidelity.capture
    assert device.fidelity.capture.kl_mean_nats == pytest.approx(process.fidelity.capture.kl_mean_nats, rel=1e-4)
    assert device.prompts == process.prompts and [g.name for g in device.gates] == [g.name for g in process.gates]


def test_against_a_checkpoint_it_is_captured_first(
    sample: Sample, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = BehaviourPlan(each=1, translations=0, max_tokens=4, batch=0)
    monkeypatch.setattr("builds.QUICK", replace(QUICK, behaviour=some))
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    outcome = run("validate", bundle, "--against", sample.checkpoint, "--device", "local", "--positions", 24)
    assert outcome.code == 2, outcome.stderr
    report = read_report(bundle / "report.json")
    assert report.fidelity.capture and report.behaviour and report.devices[0].behaviour == report.behaviour
    assert not (tmp_path / ".bundle.devices").exists()


def test_devices_that_none_answer(sample: Sample, captured: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("asyncssh", reason="the extra 'devices' is not installed")
    fleet = write(
        tmp_path / "fleet.toml",
        f'[devices.a]\nat = "ssh://me@127.0.0.1:1"\nknown_hosts = "{write(tmp_path / "known", "")}"\n'
        f'[devices.b]\nat = "ssh://me@127.0.0.1:1"\nknown_hosts = "{tmp_path / "known"}"\n',
    )
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    before = (bundle / "report.json").read_bytes()
    outcome = run("validate", bundle, "--reference", captured, "--fleet", fleet)
    assert outcome.code == EXIT_MACHINE and "No device answered" in outcome.stderr and "1 more" in outcome.stderr
    assert (bundle / "report.json").read_bytes() == before


def test_options_that_devices_do_not_have(sample: Sample, captured: Path, tmp_path: Path, run: Run) -> None:
    ask = ("validate", sample.bundle, "--reference", captured, "--device", "local")
    assert run(*ask, "--plan").code == EXIT_INPUT
    twice = run(*ask, "--device", "local")
    assert twice.code == EXIT_INPUT and "local is asked twice" in twice.stderr
    nothing = run("validate", sample.bundle, "--reference", captured, "--device", "toaster")
    assert nothing.code == EXIT_INPUT and "Devices are: local" in nothing.stderr
