"""Runtimes that decode one sequence each, every one in a process and an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.commands import exit_status

#: Threads of the one before spin a little before they sleep.
_PAUSE = 0.3


class RuntimeFailed(RuntimeError):
    """A runtime ended before it was told to; the message ends with the last that it printed."""


@dataclass(frozen=True)
class Runnable:
    """A model in a runtime's own format, and how to start it."""

    tool: str
    #: How the matrices of the blocks are stored.
    format: str
    #: Interpreter, script and arguments up to the capacity, the threads and the vocabulary, which follow.
    command: tuple[str, ...]
    #: Of the matrices of the blocks, with scales and zero points.
    bits_per_weight: float
    #: Weights that a decoded token reads, as stored.
    bytes_per_token: int
    #: Of each cached number.
    cache_bytes: float
    versions: str = ""


class Worker:
    """A process that has loaded a model and does what it is told."""

    def __init__(self, runnable: Runnable, capacity: int, threads: int, vocabulary: int) -> None:
        self.runnable = runnable
        # A file, since a pipe that nobody reads fills up.
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed with us
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self._process = subprocess.Popen(
            [*runnable.command, str(capacity), str(threads), str(vocabulary)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment | limits | {"HF_HUB_OFFLINE": "1"},
        )
        try:
            loaded = json.loads(self._line())
        except BaseException:
            self.close()
            raise
        self.runtime, self.load_s = str(loaded["runtime"]), float(loaded["load_s"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def seconds(self, do: str, tokens: int) -> list[float]:
        """How long each part of a command of ``common`` took."""
        assert self._process.stdin is not None
        time.sleep(_PAUSE)
        self._process.stdin.write(json.dumps({"do": do, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return [float(value) for value in json.loads(self._line())["seconds"]]

    def peak_bytes(self) -> int:
        """Peak resident memory of the process so far, mapped files included (VmHWM)."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
        raise RuntimeFailed(f"{self.runnable.tool}: no VmHWM")

    def close(self) -> None:
        """End it; more than once does no harm."""
        if self._stderr.closed:
            return
        self._process.kill()
        with self._stderr:
            self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._stderr.seek(0)
            last = "\n".join(self._stderr.read().strip().splitlines()[-8:])
            raise RuntimeFailed(f"{self.runnable.tool}, {self.runnable.format}: exit status {code}\n{last}")
        return line


def run(command: Sequence[object], seconds: int = 3600) -> None:
    """Run a conversion.

    Raises:
        RuntimeFailed: it failed or took longer.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        code = exit_status(command, output, seconds)
        if code is None:
            raise RuntimeFailed(f"{command[1]}: longer than {seconds} s")
        if code:
            output.seek(0)
            raise RuntimeFailed(f"{command[1]}: exit status {code}\n{output.read()[-2000:]}")
