"""The npm package onnxruntime-web: one release, checked by its digest, from npm or from a folder of the user's."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Literal

from glmexport.foundation.cache import cache_folder
from glmexport.foundation.errors import InputError, MachineError

Backend = Literal["wasm", "webgpu"]

#: The latest release; there is none of ONNX Runtime 1.31 and 1.32 yet.
VERSION = "1.30.0"
ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"
#: The digest of the archive, as npm writes it into a package-lock.json (Subresource Integrity).
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
#: The script of each backend, with everything that it needs but its WebAssembly. Both have SIMD and threads.
SCRIPTS: dict[Backend, str] = {"wasm": "ort.wasm.bundle.min.mjs", "webgpu": "ort.webgpu.bundle.min.mjs"}
_BINARIES: dict[Backend, str] = {
    "wasm": "ort-wasm-simd-threaded.wasm",
    "webgpu": "ort-wasm-simd-threaded.asyncify.wasm",
}
_BY_HAND = f"Run 'npm pack onnxruntime-web@{VERSION}' where there is a network and put {ARCHIVE} into"


def web_runtime(backend: Backend, folder: Path | None = None) -> dict[str, bytes]:
    """Return the files that ``backend`` needs, by name.

    Args:
        backend: the part of onnxruntime-web that is to run the graph.
        folder: the folder that has the archive, for machines without npm; None: it is fetched from npm once.

    Raises:
        InputError: ``folder`` does not have the archive.
        MachineError: npm is missing or fetches nothing; or the archive is not the one with that digest.
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
        # npm runs in an empty directory, so that no project's settings apply.
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
        packed = Path(folder) / ARCHIVE
        if run.returncode or not packed.is_file():
            reason = next((line for line in run.stderr.splitlines() if line.strip()), f"exit code {run.returncode}")
            raise MachineError(f"npm cannot get onnxruntime-web {VERSION}: {reason}.", next_step=by_hand)
        packed.replace(path)
