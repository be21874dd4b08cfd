"""The file of a tuned target, which ``--target`` takes."""

from __future__ import annotations

from pathlib import Path

import tomli_w

from glmexport.foundation.files import write_atomically
from glmexport.foundation.target import Target


def target_toml(target: Target) -> str:
    """Return ``target`` as TOML: every key that is not None; the file's name is the target's."""
    return tomli_w.dumps(target.model_dump(exclude={"name"}, exclude_none=True), multiline_strings=False)


def write_target(target: Target, path: Path) -> None:
    """Write ``target`` to ``path``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, target_toml(target).encode())
