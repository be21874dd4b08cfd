"""The outputs of a command, which are beside their final place until all of them are done."""

from __future__ import annotations

import shutil
from pathlib import Path


def partial_of(directory: Path) -> Path:
    """Return where an output is until all of its command are done; a command that fails leaves nothing there."""
    return directory.with_name(f".{directory.name}.partial")


def put_in_place(partial: Path, directory: Path) -> None:
    """Rename an output; what was there before is removed only after the new output has its place."""
    replaced = directory.with_name(f".{directory.name}.replaced")
    if replaced.exists():
        # A build leaves this if it is killed between the renames, or while it removes the old bundle.
        shutil.rmtree(replaced)
    if directory.exists():
        directory.rename(replaced)
    partial.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)
