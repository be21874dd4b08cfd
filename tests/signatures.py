"""Keys, certificates and signed bundles, and both verifiers asked at once."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from builds import THREADS, Sample

from glmexport.bundle.bundle import Bundle
from glmexport.foundation.errors import GlmexportError
from glmexport.foundation.progress import Silent
from glmexport.release.keys import KeyFiles, open_signatory
from glmexport.release.script import verifier_script
from glmexport.release.verification import verify
from glmexport.workflows.sign import sign_bundle

#: The verifier as it is shipped.
SCRIPT = Path(tempfile.mkdtemp(prefix="verifier-")) / "verify.py"
SCRIPT.write_text(verifier_script(), encoding="utf-8")
atexit.register(shutil.rmtree, SCRIPT.parent)
COUNTER = 7


def openssl(*arguments: str | Path) -> str:
    """What openssl prints."""
    return subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Pair:
    """Files of a private and a public key."""

    private: Path
    public: Path


def pair(directory: Path, name: str, curve: str = "prime256v1") -> Pair:
    """A new pair of keys."""
    made = Pair(directory / f"{name}.pem", directory / f"{name}.pub.pem")
    openssl("ecparam", "-name", curve, "-genkey", "-noout", "-out", made.private)
    openssl("pkey", "-in", made.private, "-pubout", "-out", made.public)
    return made


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Of who signs."""
    return pair(tmp_path_factory.mktemp("keys"), "signer")


@dataclass(frozen=True)
class Authority:
    """A root, an authority below it, and a key with its certificate."""

    root: Path
    intermediate: Path
    key: Path
    certificate: Path


def certify(
    directory: Path, name: str, issuer: tuple[Path, Path] | None, extensions: str, hashed: str = "sha256"
) -> Path:
    """A certificate of the key ``name``, by ``issuer`` (certificate and key) or by itself."""
    request, certificate, settings = (directory / f"{name}.{end}" for end in ("csr", "crt", "cnf"))
    pair(directory, name, "secp384r1")
    settings.write_text(extensions, encoding="ascii")
    openssl("req", "-new", "-key", directory / f"{name}.pem", "-subj", f"/CN={name}", "-out", request)
    by = ["-CA", issuer[0], "-CAkey", issuer[1], "-CAcreateserial"] if issuer else ["-key", directory / f"{name}.pem"]
    signed = ["-extfile", settings, "-out", certificate]
    openssl("x509", "-req", "-in", request, *by, "-days", "30", f"-{hashed}", *signed)
    return certificate


AUTHORITY = "basicConstraints=critical,CA:TRUE\nkeyUsage=keyCertSign\n"
SIGNING = "keyUsage=critical,digitalSignature\n"


def make_authority(directory: Path, uses: str = SIGNING) -> Authority:
    """Root, intermediate and a certificate with these ``uses``."""
    root = certify(directory, "root", None, AUTHORITY)
    middle = certify(directory, "middle", (root, directory / "root.pem"), AUTHORITY)
    leaf = certify(directory, "leaf", (middle, directory / "middle.pem"), uses)
    return Authority(root, middle, directory / "leaf.pem", leaf)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """What vouches for certificates."""
    return make_authority(tmp_path_factory.mktemp("authority"))


def sign_with(bundle: Path, key: Path, counter: int = COUNTER, **options: bool) -> None:
    """Sign without golden answers, unless they are asked for."""
    settings = {"golden": False, **options}
    signatory = open_signatory(KeyFiles(key))
    sign_bundle(
        Bundle.open(bundle), signatory, counter=counter, threads=THREADS, progress=Silent(), **settings
    )


@pytest.fixture(scope="session")
def signed(sample: Sample, keys: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle under a signature, with golden answers. Copy what a test changes."""
    bundle = tmp_path_factory.mktemp("signed") / "bundle"
    shutil.copytree(sample.bundle, bundle)
    sign_with(bundle, keys.private, golden=True)
    return bundle


@pytest.fixture
def release(signed: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(signed, tmp_path / "release"))


def resign(bundle: Path, key: Path, digests: Mapping[str, str] | None = None) -> None:
    """A signature of what is there, or of what ``digests`` claim: hostile content by a key that is trusted."""
    if digests is None:
        paths = sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != "model.sig")
        digests = {path.relative_to(bundle).as_posix(): sha256(path) for path in paths}
    (bundle / "model.sig").write_bytes(open_signatory(KeyFiles(key)).model_signature("bundle", digests))


def sha256(path: Path) -> str:
    """Hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): sha256(path) for path in paths}


@dataclass(frozen=True)
class Judged:
    """Exit code of both verifiers, and what each said."""

    code: int
    package: str
    script: str

    def __contains__(self, words: str) -> bool:
        return words in self.package and words in self.script


Judge = Callable[..., Judged]


@pytest.fixture
def outcome(keys: Pair) -> Judge:
    """Ask the package and the script, which has to agree, without the packages of this environment."""

    def judge(
        bundle: Path,
        *,
        key: Path | None = None,
        root: Path | None = None,
        newer: int | None = None,
        subject: str | None = None,
    ) -> Judged:
        key = keys.public if key is None and root is None else key
        given = ["--key", str(key)] if key else ["--root", str(root)]
        given += [] if newer is None else ["--newer-than", str(newer)]
        given += [] if subject is None else ["--subject", subject]
        command = [sys.executable, "-I", "-S", str(SCRIPT), str(bundle), *given, "--json"]
        asked = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        try:
            found = verify(bundle, key, root=root, newer_than=newer, subject=subject)
        except GlmexportError as error:
            assert asked.returncode == error.exit_code, f"{error} | {asked.stderr}"
            assert not asked.stdout and "Traceback" not in asked.stderr
            return Judged(error.exit_code, str(error), asked.stderr)
        assert (asked.returncode, asked.stderr) == (0, "")
        assert json.loads(asked.stdout) == found._asdict()
        return Judged(0, "", "")

    return judge
