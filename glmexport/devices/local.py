"""This machine as a device: the device program runs in a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from glmexport.foundation.errors import MachineError
from glmexport.foundation.progress import Progress
from glmexport.wire.runner import LINE_BYTES, PROGRAM, SILENCE_S, Ended, follow, program


@dataclass(frozen=True)
class LocalRunner:
    """The program under ``command``, which ends with a Python; ``emulated`` says why its speed says nothing."""

    name: str = "local"
    command: Sequence[str] = (sys.executable,)
    environment: Mapping[str, str] = field(default_factory=dict)
    emulated: str | None = None
    silence: float = SILENCE_S

    def __call__(self, job: Path, results: Path, progress: Progress) -> None:
        """Let the program answer the job; see ``Runner``."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / PROGRAM
            path.write_bytes(program())
            asyncio.run(self._run(path, job, results, progress))

    async def _run(self, path: Path, job: Path, results: Path, progress: Progress) -> None:
        marks = ["--emulated", self.emulated] if self.emulated else []
        with tempfile.TemporaryFile() as said:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self.command,
                    *(str(each) for each in (path, job.resolve(), results.resolve())),
                    *marks,
                    "--attended",
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=said,
                    limit=LINE_BYTES,
                    env={**os.environ, **self.environment},
                )
            except OSError as error:
                raise MachineError(
                    f"{self.name}: {self.command[0]} cannot be run: {error.strerror}.",
                    next_step="Install it, or correct its name.",
                ) from error
            assert process.stdout is not None
            try:
                await follow(process.stdout.readline, progress, self.name, self.silence)
            except Ended as error:
                code = await _ended(process, patience=1)
                said.seek(0)
                last = (said.read().decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
                raise Ended(f"{error.message} (exit {code}: {last})", next_step=error.next_step) from error
            finally:
                await _ended(process)


async def _ended(process: asyncio.subprocess.Process, patience: float = 0) -> int:
    """Return the exit code of a process, which is killed if it has not ended.

    ``patience``: seconds for one that is about to end by itself, with a code that says why.
    """
    if process.returncode is None and patience:
        with suppress(TimeoutError):
            return await asyncio.wait_for(process.wait(), patience)
    if process.returncode is None:
        process.kill()
    # Output that nobody reads any more would keep the wait from ending.
    await process.communicate()
    return await process.wait()
