"""onnxruntime-web as npm has it: one release, checked by its digest, from npm or from a folder of the user's."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Literal

from glmexport.foundation.errors import InputError, MachineError

Backend = Literal["wasm", "webgpu"]

#: The last release; there is none of ONNX Runtime 1.31 and 1.32 yet.
VERSION = "1.30.0"
ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"
#: As npm writes it into a package-lock.json (Subresource Integrity).
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
#: The script of each backend, with everything that it needs in it, and its WebAssembly. Both have SIMD and threads.
SCRIPTS: dict[Backend, str] = {"wasm": "ort.wasm.bundle.min.mjs", "webgpu": "ort.webgpu.bundle.min.mjs"}
_BINARIES: dict[Backend, str] = {
    "wasm": "ort-wasm-simd-threaded.wasm",
    "webgpu": "ort-wasm-simd-threaded.asyncify.wasm",
}
_BY_HAND = f"Run 'npm pack onnxruntime-web@{VERSION}' where there is a network and put {ARCHIVE} into"


def cache_folder() -> Path:
    """Where the release is kept: ``$XDG_CACHE_HOME/glmexport``, or ``~/.cache/glmexport``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "glmexport"


def web_runtime(backend: Backend, folder: Path | None = None) -> dict[str, bytes]:
    """The files that ``backend`` needs, by name.

    Args:
        backend: where the graph is to run.
        folder: that has the archive, for machines without npm; otherwise it is got from npm once.

    Raises:
        InputError: ``folder`` does not have it.
        MachineError: npm is missing or gets nothing; or the archive is not the one that was tried.
    """
    path = (folder or cache_folder()) / ARCHIVE
    if not path.is_file():
        if folder:
            raise InputError(f"{folder} has no {ARCHIVE}.", next_step=f"{_BY_HAND} that folder.")
        _download(path)
    content = path.read_bytes()
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if f"sha512-{digest}" != INTEGRITY:
        raise MachineError(
            f"{path} is not the release of onnxruntime-web that glmexport was tried with: its sha512 differs.",
            next_step="Remove it; it is fetched again, or put there by hand.",
        )
    with tarfile.open(path, "r:gz") as archive:
        return {name: _member(archive, name) for name in (SCRIPTS[backend], _BINARIES[backend])}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(f"package/dist/{name}")
    assert file is not None
    return file.read()


def _download(path: Path) -> None:
    npm = shutil.which("npm")
    by_hand = f"{_BY_HAND} {path.parent}."
    if npm is None:
        raise MachineError(
            f"onnxruntime-web {VERSION} is not on this machine, and npm, which would get it, is missing.",
            next_step=f"Install npm, or: {by_hand}",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [npm, "pack", "--silent", f"onnxruntime-web@{VERSION}", "--pack-destination", folder]
        # In an empty directory: the project that somebody stands in has no say.
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
        packed = Path(folder) / ARCHIVE
        if run.returncode or not packed.is_file():
            reason = next((line for line in run.stderr.splitlines() if line.strip()), f"exit code {run.returncode}")
            raise MachineError(f"npm cannot get onnxruntime-web {VERSION}: {reason}.", next_step=by_hand)
        packed.replace(path)
