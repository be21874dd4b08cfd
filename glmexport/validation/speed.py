"""Runtimes that take turns: one process each, one of them at work at a time.

What slows the machine for a while so falls on both sides, and who goes first changes from round to round (ABBA), so
that a steady drift cancels between two rounds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import Self, TypeVar

from glmexport.engine.placement import Node
from glmexport.foundation.definition import Definition
from glmexport.foundation.errors import MachineError
from glmexport.foundation.progress import Progress
from glmexport.validation.runtimes import Loaded, Memory, Nodes, Round, RuntimeRequest

#: As many as bounds of 95 % take, and a whole number of ABBA.
LEAST_ROUNDS = 6
#: Seconds between turns: threads of the one before spin a little before they sleep.
_PAUSE = 0.05

Answer = TypeVar("Answer", bound=Definition)


@dataclass(frozen=True)
class Turns:
    """What one runtime showed. ``nodes`` only of a bundle, for which they were asked."""

    runtime: str
    threads: int | None
    load_s: float
    rounds: tuple[Round, ...]
    memory: Memory
    nodes: tuple[Node, ...] = ()


def take_turns(requests: Sequence[RuntimeRequest], seconds: float, progress: Progress) -> list[Turns]:
    """Let each of ``requests`` generate once a round, in the opposite order every other round.

    Loading and a generation to warm up come before; where the nodes of the first one's graph ran, in the end.

    Args:
        requests: the bundle, and the original if it is measured.
        seconds: rounds go on for so long, and for ``LEAST_ROUNDS``; 0: one ABBA, which are two.
        progress: who watches.

    Raises:
        MachineError: a process failed, for example for lack of memory.
    """
    with ExitStack() as stack, progress.track("Speed", max(1, round(seconds))) as track:
        workers = [stack.enter_context(Worker(request)) for request in requests]
        rounds: list[list[Round]] = []
        begun, told = time.monotonic(), 0
        while goes_on(len(rounds), time.monotonic() - begun, seconds):
            order = workers if len(rounds) % 2 == 0 else workers[::-1]
            taken = {}
            for worker in order:
                time.sleep(_PAUSE)
                taken[worker] = worker.ask("generate", Round)
            rounds.append([taken[worker] for worker in workers])
            passed = min(int(time.monotonic() - begun), round(seconds))
            track.advance(passed - told, f"round {len(rounds)}")
            told = passed
        memories = [worker.ask("memory", Memory) for worker in workers]
        for worker in workers[1:]:
            worker.close()
        nodes = workers[0].ask("place", Nodes).nodes
        return [
            Turns(
                runtime=worker.loaded.runtime,
                threads=worker.request.threads,
                load_s=worker.loaded.load_s,
                rounds=tuple(each[index] for each in rounds),
                memory=memories[index],
                nodes=() if index else nodes,
            )
            for index, worker in enumerate(workers)
        ]


def goes_on(rounds: int, passed: float, seconds: float) -> bool:
    """Return whether another round is due: in pairs, until ``seconds`` have passed and the rounds suffice."""
    if rounds < 2 or rounds % 2:
        return True
    return seconds > 0 and (rounds < LEAST_ROUNDS or passed < seconds)


class Worker:
    """A process that has loaded one runtime and waits.

    Raises:
        MachineError: it ended before it was told to.
    """

    def __init__(self, request: RuntimeRequest) -> None:
        self.request = request
        # A file, since a pipe that nobody reads fills up.
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed with us
        # The child must find this package however it was installed, and must not inherit limits on threads.
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "glmexport.validation.runtimes", request.model_dump_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env=os.environ | {"OMP_NUM_THREADS": str(request.threads), "PYTHONPATH": path},
        )
        try:
            self.loaded = self._answer(Loaded)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, command: str, kind: type[Answer]) -> Answer:
        """Its answer to ``command``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        return self._answer(kind)

    def close(self) -> None:
        """End it; more than once does no harm."""
        if self._stderr.closed:
            return
        if self._process.poll() is None:
            self._process.kill()
        # Closes the pipes as well; what was still to be written to a dead process does not matter.
        with self._stderr:
            self._process.communicate()

    def _answer(self, kind: type[Answer]) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return kind.model_validate_json(line)

    def _ended(self) -> MachineError:
        code = self._process.wait()
        self._stderr.seek(0)
        last = (self._stderr.read().strip().splitlines() or ["no message"])[-1]
        how = f"killed by {Signals(-code).name}" if code < 0 else f"exit {code}"
        return MachineError(
            f"Measuring the speed of {self.request.runtime} failed ({how}): {last}.",
            next_step="Free memory, then run the same command again.",
        )
