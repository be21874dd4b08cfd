"""A real sshd on loopback, which lets one key in."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from glmexport.devices.ssh import SshRunner
from glmexport.wire.ssh import SshAddress


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
        where = {key: options.pop(key) for key in ("key", "known_hosts", "port") if key in options}
        python = os.environ.get("GLMEXPORT_DEVICE_PYTHON", PYTHON)
        return SshRunner(replace(self.address, **where), **{"python": python, "work": str(work), **options})

    def cut(self) -> None:
        """Kill every connection, with all that runs in it, as when a line breaks for good."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.name().startswith("sshd"):
                child.kill()


PYTHON = shutil.which("python3", path=str(Path(sys.executable).parent)) or sys.executable


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
