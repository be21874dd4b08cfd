"""Checks of free space and of the permission to write, made before anything is read."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from glmexport.foundation.errors import MachineError


def free_bytes(directory: Path) -> int:
    """Return the bytes that are free where ``directory`` is, or will be."""
    absolute = directory.absolute()
    return shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free


def require_free(parent: Path, needed: int, what: str) -> None:
    """Make ``parent`` if ``needed`` bytes are free where it is.

    Raises:
        MachineError: they are not, or the directory cannot be made.
    """
    try:
        # Nothing is made before it is known to fit.
        free = free_bytes(parent)
        if free >= needed:
            parent.mkdir(parents=True, exist_ok=True)
            require_writable(parent)
    except OSError as error:
        raise MachineError(
            f"{parent} cannot be written: {error.strerror}.", next_step="Choose another directory with -o."
        ) from error
    if free < needed:
        raise MachineError(
            f"{what} needs {needed / 2**30:.1f} GiB of disk in {parent}, and {free / 2**30:.1f} GiB are free.",
            next_step="Free space, or choose another directory with -o.",
        )


def require_writable(directory: Path) -> None:
    """Check that a file can be written into ``directory``: one is made and removed at once.

    Raises:
        MachineError: it cannot be written.
    """
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise MachineError(
            f"{directory} cannot be written: {error.strerror}.", next_step="Check its permissions, or copy it."
        ) from error
