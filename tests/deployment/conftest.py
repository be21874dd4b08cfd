"""Signed bundles, and servers behind a real sshd whose service a supervisor keeps, as systemd would."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from builds import Sample, run, sample
from signatures import authority, keys, release, signed
from sshd import PYTHON, Sshd, sshd

from glmexport.bundle.bundle import Bundle
from glmexport.deployment.signed import SignedBundle
from glmexport.deployment.site import Site, open_site
from glmexport.foundation.progress import Silent
from glmexport.release.keys import KeyFiles, open_signatory
from glmexport.workflows.sign import sign_bundle

__all__ = ["authority", "keys", "release", "run", "sample", "signed", "sshd"]
HERE = Path(__file__).parent
#: A release whose counter ends in it is answered for wrongly by the stand-in.
DAMAGED = 9


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    command = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", private]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


@dataclass
class Releases:
    """Bundles by counter, signed when first asked for: copies of one that differ in nothing but their counter."""

    folder: Path
    original: Path
    private: Path
    public: Path
    made: dict[int, Path] = field(default_factory=dict)

    def __call__(self, counter: int) -> Path:
        if counter not in self.made:
            directory = self.folder / str(counter)
            if self.made:
                # What was recorded before is right for a copy.
                shutil.copytree(next(iter(self.made.values())), directory)
            else:
                shutil.copytree(self.original, directory)
            signatory = open_signatory(KeyFiles(self.private))
            sign_bundle(Bundle.open(directory), signatory, counter=counter, force=True, progress=Silent())
            self.made[counter] = directory
        return self.made[counter]

    def signed(self, counter: int) -> SignedBundle:
        return SignedBundle.open(self(counter), self.public, Silent())


@pytest.fixture(scope="session")
def releases(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Releases:
    folder = tmp_path_factory.mktemp("releases")
    return Releases(folder, sample.bundle, *key_pair(folder, "key"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Place:
    """A server's folder, and the process that keeps its service."""

    root: Path
    port: int
    control: Path
    program: list[str]
    process: subprocess.Popen[bytes]

    @property
    def current(self) -> str | None:
        link = self.root / "current"
        return Path(link.readlink()).name if link.is_symlink() else None

    def toml(self, name: str, sshd: Sshd, **options: object) -> str:
        settings: dict[str, object] = {
            "at": f"ssh://{sshd.address.user}@127.0.0.1:{sshd.port}", "key": str(sshd.key),
            "known_hosts": str(sshd.known_hosts), "root": str(self.root), "python": PYTHON,
            "glmexport": self.program[0], "port": self.port,
            "restart": [sys.executable, str(HERE / "supervisor.py"), "restart", str(self.control)],
            "ready_s": 60, **options,
        }  # fmt: skip
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        return f"[servers.{name}]\n" + "\n".join(lines) + "\n"


@pytest.fixture
def stand_in(tmp_path: Path) -> list[str]:
    """A program in place of glmexport, without a model."""
    path = tmp_path / "stand-in"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "stand_in.py"} "$@"\n')
    path.chmod(0o755)
    return [str(path)]


Places = Callable[..., Place]


@pytest.fixture
def places(tmp_path: Path, stand_in: list[str]) -> Iterator[Places]:
    """Makes servers."""
    made: list[Place] = []

    def make(program: list[str] | None = None, options: list[str] | None = None) -> Place:
        name = f"server{len(made)}"
        root, control, port = tmp_path / name, tmp_path / f"{name}.control", free_port()
        root.mkdir()
        chosen = program or stand_in
        command = [sys.executable, str(HERE / "supervisor.py"), "run", str(control), str(port), str(root / "current")]
        process = subprocess.Popen([*command, *chosen, "serve", str(root / "current"), *(options or [])])
        until = time.monotonic() + 20
        while not control.exists() and time.monotonic() < until:
            time.sleep(0.02)
        made.append(Place(root, port, control, chosen, process))
        return made[-1]

    yield make
    for place in made:
        place.process.terminate()
        place.process.wait(60)


def write_site(path: Path, releases: Releases, *servers: str, **options: object) -> Site:
    """A site's file, opened."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in {"trust": str(releases.public), **options}.items()]
    path.write_text("\n".join(lines) + "\n" + "\n".join(servers), encoding="utf-8")
    return open_site(path)
