"""Commands of other tools, whose output goes to a file: it may be long, and a pipe that nobody reads fills up."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any


def exit_status(
    command: Sequence[object],
    output: IO[Any],
    seconds: int,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> int | None:
    """Run ``command``, what it prints and complains into ``output``; None if it was stopped after ``seconds``."""
    try:
        return subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=seconds,
        ).returncode
    except subprocess.TimeoutExpired:
        return None
