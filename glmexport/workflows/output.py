"""Outputs of a command: beside their place until all of them are done."""

from __future__ import annotations

import shutil
from pathlib import Path


def partial_of(directory: Path) -> Path:
    """Where an output is until all outputs of its command are done; a command that fails leaves nothing there."""
    return directory.with_name(f".{directory.name}.partial")


def put_in_place(partial: Path, directory: Path) -> None:
    """Rename; what was there before is removed only after the new output has its place."""
    replaced = directory.with_name(f".{directory.name}.replaced")
    if replaced.exists():
        # Of a build that was killed between the renames, or while it removed the old bundle.
        shutil.rmtree(replaced)
    if directory.exists():
        directory.rename(replaced)
    partial.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)
