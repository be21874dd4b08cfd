"""Devices behind a real sshd: whatever breaks, the answers are the same bytes or there is a message."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from devices.conftest import PROMPTS, TEXTS, Hooked, answered
from sshd import Sshd

from glmexport.devices.answers import DeviceAnswers
from glmexport.devices.local import LocalRunner
from glmexport.devices.ssh import open_ssh
from glmexport.foundation.errors import InputError, MachineError
from glmexport.foundation.progress import Silent
from glmexport.wire import transfer

pytest.importorskip("asyncssh", reason="the extra 'devices' is not installed")


@pytest.fixture(scope="module")
def local(job: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What this machine answers."""
    results = tmp_path_factory.mktemp("local")
    LocalRunner()(job, results, Silent())
    return answered(results)


def test_answers_come_back(job: Path, sshd: Sshd, tmp_path: Path, local: dict[str, bytes]) -> None:
    progress = Hooked("none", 0, lambda: None)
    runner = sshd.runner(tmp_path / "work")
    runner(job, tmp_path / "results", progress)
    assert answered(tmp_path / "results") == local and len(local) == TEXTS + PROMPTS
    answers = DeviceAnswers.open("device", job, tmp_path / "results")
    assert answers.result.device.emulated is None and answers.result.speed is not None
    assert progress.seen["Sending"] > 1 and progress.seen["Texts"] == TEXTS
    # Once more: nothing is sent, answered or fetched that is there.
    again = Hooked("none", 0, lambda: None)
    runner(job, tmp_path / "results", again)
    assert "Sending" not in again.seen and "Fetching" not in again.seen and again.seen["Texts"] == TEXTS
    assert answered(tmp_path / "results") == local


@pytest.mark.parametrize(("label", "steps"), [("Sending", 3), ("Texts", 1), ("Free answers", 1), ("Fetching", 2)])
def test_a_killed_connection_is_taken_up_again(
    job: Path, sshd: Sshd, tmp_path: Path, local: dict[str, bytes], label: str, steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(transfer, "CHUNK", 1 << 14)
    monkeypatch.setattr("glmexport.wire.ssh._WAIT_S", 0.05)
    progress = Hooked(label, steps, sshd.cut)
    sshd.runner(tmp_path / "work")(job, tmp_path / "results", progress)
    assert progress.happened == 1
    assert any("connection lost" in remark and "1 of 5" in remark for remark in progress.remarks)
    assert answered(tmp_path / "results") == local
    DeviceAnswers.open("device", job, tmp_path / "results")


def test_a_connection_that_is_always_lost_is_given_up(
    job: Path, sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmexport.wire.ssh._WAIT_S", 0.01)

    class Always(Hooked):
        def __init__(self) -> None:
            super().__init__("Checking files", 1, self.again)

        def again(self) -> None:
            sshd.cut()
            self.happened = 0

    with pytest.raises(MachineError, match="the connection was lost 3 times") as error:
        sshd.runner(tmp_path / "work", reconnects=2)(job, tmp_path / "results", Always())
    assert error.value.next_step.endswith("it goes on.")


def test_a_wrong_host_key_is_refused(job: Path, sshd: Sshd, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    kind, key, *_ = (tmp_path / "other.pub").read_text().split()
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{sshd.port} {kind} {key}\n")
    for text in (known.read_text(), ""):
        known.write_text(text)
        with pytest.raises(MachineError, match=r"host key of 127\.0\.0\.1 is refused"):
            sshd.runner(tmp_path / "work", known_hosts=known)(job, tmp_path / "results", Silent())
        assert known.read_text() == text
    assert not (tmp_path / "work").exists() and not (tmp_path / "results").exists()
    with pytest.raises(InputError, match="no file of known hosts"):
        sshd.runner(tmp_path / "work", known_hosts=tmp_path / "none")(job, tmp_path / "results", Silent())


def test_a_user_who_is_not_let_in_and_a_device_that_is_down(job: Path, sshd: Sshd, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    with pytest.raises(MachineError, match="does not let this user in"):
        sshd.runner(tmp_path / "work", key=tmp_path / "other")(job, tmp_path / "results", Silent())
    with pytest.raises(MachineError, match="cannot be reached"):
        sshd.runner(tmp_path / "work", port=1)(job, tmp_path / "results", Silent())


def test_a_python_that_is_not_there_is_named(job: Path, sshd: Sshd, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"/no/python3: exit 127: .*(not found|No such file)"):
        sshd.runner(tmp_path / "work", python="/no/python3")(job, tmp_path / "results", Silent())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small file system cannot be mounted here: it takes root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_told_before_anything_is_sent(job: Path, sshd: Sshd, small_disk: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"no space left on the device: \d MiB are free"):
        sshd.runner(small_disk / "work")(job, tmp_path / "results", Silent())


def test_a_disk_that_fills_up_while_files_are_sent(
    job: Path, sshd: Sshd, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmexport.devices.ssh._Visit._require_free", _nothing)
    (small_disk / "filler").write_bytes(bytes((1 << 21) - (300 << 10)))
    with pytest.raises(MachineError, match=r"device refused a file|no space left"):
        sshd.runner(small_disk / "work")(job, tmp_path / "results", Silent())
    # With room it goes on.
    (small_disk / "filler").unlink()
    sshd.runner(small_disk / "work")(job, tmp_path / "results", Silent())
    DeviceAnswers.open("device", job, tmp_path / "results")


async def _nothing(*_: object) -> None:
    pass


def test_a_disk_that_fills_up_while_the_device_answers(
    job: Path, sshd: Sshd, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: dict[str, bytes]
) -> None:
    monkeypatch.setattr("glmexport.devices.ssh._Visit._require_free", _nothing)
    filler = small_disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 12))
            except OSError:
                pass

    progress = Hooked("Free answers", 1, fill)
    with pytest.raises(MachineError, match="There is no space left for the results"):
        sshd.runner(small_disk / "work")(job, tmp_path / "results", progress)
    filler.unlink()
    sshd.runner(small_disk / "work")(job, tmp_path / "results", Silent())
    assert answered(tmp_path / "results") == local


def test_a_device_that_dies_says_how(job: Path, sshd: Sshd, tmp_path: Path) -> None:
    def kill() -> None:
        for child in psutil.Process(sshd.process.pid).children(recursive=True):
            if any("program.pyz" in word for word in child.cmdline()) and "--attended" in child.cmdline():
                child.kill()

    with pytest.raises(MachineError, match=r"killed by KILL|exit 137"):
        sshd.runner(tmp_path / "work")(job, tmp_path / "results", Hooked("Texts", 1, kill))


def test_results_that_were_changed_on_the_device_are_refused(job: Path, sshd: Sshd, tmp_path: Path) -> None:
    runner = sshd.runner(tmp_path / "work")
    runner(job, tmp_path / "results", Silent())
    shutil.rmtree(tmp_path / "results")

    def change() -> None:
        (file,) = (tmp_path / "work").glob("jobs/*/results/answers/3.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    with pytest.raises(MachineError, match=r"answers/3.safetensors is not the file that the results list"):
        runner(job, tmp_path / "results", Hooked("Fetching", 1, change))


@pytest.mark.parametrize("address", ["ssh://", "ssh://user@host:x", "ssh://host/path", "http://host", "ssh://a:b@host"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InputError, match="no device behind SSH"):
        open_ssh(address)


def test_an_address() -> None:
    runner = open_ssh("ssh://me@edge-7:2222")
    address = runner.address
    assert (address.user, address.host, address.port) == ("me", "edge-7", 2222)
    assert replace(runner, python="x").python == "x" and os.fspath(address.known_hosts) == "~/.ssh/known_hosts"
