"""Bundles whose files are links, as the hub's cache lays them out, for libraries that follow none out of a folder."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import psutil

from glmexport.foundation.errors import MachineError
from glmexport.foundation.files import cache_repository

_PREFIX = ".glmexport-"


def loadable(bundle: Path) -> Path:
    """Return a folder with the files of ``bundle`` from which ONNX Runtime loads: itself, if its files are real.

    ONNX Runtime reads weights in the folder where a graph really is, and below. So of a bundle in the hub's cache the
    folder has links to the weights, and to copies of the graphs (which are small) at the top of the cache. All of it is
    gone when the process ends; what a killed process left goes with the next.

    Raises:
        MachineError: the cache cannot be written to.
    """
    return _loadable(bundle.resolve())


@cache
def _loadable(bundle: Path) -> Path:
    root = cache_of(bundle)
    if root is None:
        return bundle
    _remove_left(root)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))
        atexit.register(_remove, folder)
        for path in (path for path in bundle.rglob("*") if path.is_file()):
            place, real = folder / path.relative_to(bundle), path.resolve()
            if path.suffix == ".onnx":
                real = root / f"{folder.name}.{path.name}"
                shutil.copyfile(path, real)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(real)
    except OSError as error:
        raise MachineError(
            f"The files of {bundle} are links, and ONNX Runtime follows them only with a copy of the graph in {root}, "
            f"which cannot be written: {error.strerror}.",
            next_step=f"Copy the bundle: cp -rL {bundle} DIRECTORY.",
        ) from error
    return folder


def cache_of(bundle: Path) -> Path | None:
    """Return the hub's cache that a bundle with links is in."""
    repository = cache_repository(bundle)
    return repository.parent if repository and any(path.is_symlink() for path in bundle.rglob("*")) else None


def _remove_left(root: Path) -> None:
    """Remove what processes left that are no more."""
    for folder in root.glob(f"{_PREFIX}*"):
        process = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if folder.is_dir() and process.isdecimal() and not psutil.pid_exists(int(process)):
            _remove(folder)


def _remove(folder: Path) -> None:
    for path in folder.parent.glob(f"{folder.name}.*"):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
