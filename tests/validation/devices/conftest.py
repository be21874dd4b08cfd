"""A job about the small bundle, and a real sshd on loopback that devices are behind."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from builds import QUICK, THREADS, Sample, run, sample

from glmexport.bundle import read_manifest
from glmexport.capture import CaptureOptions, capture_reference
from glmexport.job import Original
from glmexport.progress import Silent, Track
from glmexport.ssh import SshAddress
from glmexport.validation.capture import CapturedReference
from glmexport.validation.devices.job import PromptQuestion, SpeedRequest, TextQuestion, write_job
from glmexport.validation.devices.ssh import SshRunner

__all__ = ["run", "sample"]
TEXTS, PROMPTS = 4, 2


@pytest.fixture(scope="session")
def captured(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's original, of whose 264 tokens 200 are kept, with its free answers."""
    directory = tmp_path_factory.mktemp("captured") / "ref"
    options = CaptureOptions(THREADS, QUICK, top_k=200)
    capture_reference(Original.open(str(sample.checkpoint), Silent()), directory, options, Silent())
    return directory


@pytest.fixture(scope="session")
def reference(captured: Path) -> CapturedReference:
    return CapturedReference.open(captured)


def questions(reference: CapturedReference, count: int = TEXTS) -> list[TextQuestion]:
    return [
        TextQuestion(text.ids, text.prefix, reference.kept(index).tokens, reference.audited(index))
        for index, text in enumerate(reference.texts[:count])
    ]


@pytest.fixture(scope="session")
def job(sample: Sample, reference: CapturedReference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some texts, some prompts, and two rounds of speed."""
    folder = tmp_path_factory.mktemp("job") / "job"
    asked = questions(reference)
    write_job(
        folder,
        sample.bundle,
        read_manifest(sample.bundle),
        asked,
        [PromptQuestion(text.ids[:8].tolist(), 6) for text in asked[:PROMPTS]],
        vocabulary_size=reference.capture.vocabulary_size,
        speed=SpeedRequest(prompt=tuple(asked[0].ids.tolist()), generated_tokens=4, rounds=2, seconds=0),
        threads=THREADS,
    )
    return folder


def answered(results: Path) -> dict[str, bytes]:
    """Every answer, byte for byte."""
    return {path.relative_to(results).as_posix(): path.read_bytes() for path in sorted(results.glob("*/*.safetensors"))}


class Hooked(Silent):
    """Does something once a step of some work is done."""

    def __init__(self, label: str, steps: int, then: Callable[[], None]) -> None:
        super().__init__()
        self.label, self.steps, self.then = label, steps, then
        self.seen: dict[str, int] = {}
        self.happened = 0

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Track]:
        with super().track(label, total) as track:
            yield _HookedTrack(self, label, track)


class _HookedTrack:
    def __init__(self, hooked: Hooked, label: str, track: Track) -> None:
        self.hooked, self.label, self.track = hooked, label, track

    def advance(self, steps: int = 1, detail: str = "") -> None:
        hooked = self.hooked
        hooked.seen[self.label] = hooked.seen.get(self.label, 0) + steps
        if self.label == hooked.label and hooked.seen[self.label] >= hooked.steps and not hooked.happened:
            hooked.happened += 1
            hooked.then()


@dataclass
class Sshd:
    """A server of our own, its host key in ``known_hosts``, and a key that it lets in."""

    port: int
    directory: Path
    process: psutil.Popen

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    @property
    def key(self) -> Path:
        return self.directory / "user"

    @property
    def address(self) -> SshAddress:
        return SshAddress("device", "127.0.0.1", getpass.getuser(), self.port, self.key, self.known_hosts)

    def runner(self, work: Path, **options: Any) -> SshRunner:
        where = {key: options.pop(key) for key in ("key", "known_hosts") if key in options}
        python = os.environ.get("GLMEXPORT_DEVICE_PYTHON", PYTHON)
        return SshRunner(replace(self.address, **where), **{"python": python, "work": str(work), **options})

    def cut(self) -> None:
        """Kill every connection, with all that runs in it, as when a line breaks for good."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.name().startswith("sshd"):
                child.kill()


PYTHON = shutil.which("python3", path=str(Path(os.sys.executable).parent)) or os.sys.executable  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    server = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if server is None:
        pytest.skip("sshd is not installed (apt-get install openssh-server)")
    directory = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(command, check=True)
    shutil.copyfile(directory / "user.pub", directory / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind, key, *_ = (directory / "host.pub").read_text().split()
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    settings = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": directory / "host",
        "AuthorizedKeysFile": directory / "authorized_keys", "PidFile": directory / "pid", "StrictModes": "no",
        "UsePAM": "no", "PasswordAuthentication": "no", "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "prohibit-password", "Subsystem": "sftp internal-sftp", "MaxStartups": "100",
    }  # fmt: skip
    (directory / "config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    process = psutil.Popen([server, "-D", "-e", "-f", str(directory / "config")], stderr=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    else:
        process.kill()
        pytest.fail("sshd does not listen")
    server_ = Sshd(port, directory, process)
    yield server_
    server_.cut()
    process.terminate()
    process.wait(10)
