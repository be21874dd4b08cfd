"""Processes that are watched: wall and processor seconds, peak memory with that of their children, and their stages."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

#: A stage of the command line that has ended, as it is logged where there is no terminal: name, bar, steps, time.
_STAGE = re.compile(r"^(?P<name>\S.*?) +[━╸╺ ]+ (?P<done>\d+)/(?P<total>\d+) \d+:\d\d:\d\d")
#: Seconds between samples, which take milliseconds, of a process that has just begun and of one that takes long.
_SAMPLE_S, _SAMPLE_LONG_S = 0.2, 1.0
_LONG_S = 30.0


@dataclass
class Stage:
    """A stage of a command, from the end of the one before it to its own."""

    name: str
    wall_s: float
    processor_s: float
    #: The peak resident memory of the process until then, of which it is never less.
    peak_bytes: int
    #: The most resident memory that was seen meanwhile, of the process and of its children together.
    seen_bytes: int


@dataclass
class Cost:
    """The cost of one process and its children."""

    command: list[str]
    wall_s: float = 0.0
    processor_s: float = 0.0
    #: VmHWM of the process itself, and the largest of a child's.
    peak_bytes: int = 0
    peak_child_bytes: int = 0
    #: The most resident memory of all together, and what of it is no page of a file, as far as it was seen.
    seen_bytes: int = 0
    seen_anonymous_bytes: int = 0
    exit_code: int | None = None
    killed: bool = False
    stages: list[Stage] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return the figures for a file of results, without the folders of the machine."""
        command = " ".join(named(self.command))
        return vars(self) | {"command": command, "stages": [vars(stage) for stage in self.stages]}


class Watched:
    """A process under way, of which samples are taken."""

    def __init__(self, command: Sequence[object], log: Path, stdout: int | None = None) -> None:
        self.cost = Cost([str(part) for part in command])
        self.log = log
        self._started = time.monotonic()
        self._before = _processor_of_children()
        with log.open("ab") as file:
            self._read = file.tell()
            self.process = subprocess.Popen(
                self.cost.command,
                stdin=subprocess.DEVNULL,
                stdout=file if stdout is None else stdout,
                stderr=subprocess.STDOUT if stdout is None else file,
            )
        self._whole = psutil.Process(self.process.pid)
        self._processor: dict[int, float] = {}
        self._stage_peak = 0

    def finish(self, poll: Callable[[Cost], bool] | None = None, every_s: float = 0.2) -> Cost:
        """Wait for the end of the process, which is killed as soon as ``poll`` returns True, or if this is interrupted.

        ``poll`` is given what is known so far, every so many seconds.
        """
        last = -_SAMPLE_LONG_S
        try:
            while self.process.poll() is None:
                now = time.monotonic() - self._started
                if now - last >= (_SAMPLE_S if now < _LONG_S else _SAMPLE_LONG_S):
                    self.sample()
                    last = now
                if poll is not None and poll(self.cost):
                    self.kill()
                time.sleep(every_s)
        except BaseException:
            self.kill()
            raise
        finally:
            self._end()
        return self.cost

    def kill(self) -> None:
        """End the process and its children without a chance to tidy up."""
        victims = [self._whole, *self._children()]
        for victim in victims:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        self.cost.killed = True

    def sample(self) -> None:
        """Look at the memory and time of the process and its children, and at the stages that have ended."""
        resident = anonymous = 0
        for process in (self._whole, *self._children()):
            try:
                own = process == self._whole
                times = process.cpu_times()
                self._processor[process.pid] = times.user + times.system
                status = _status(process.pid)
            except (psutil.NoSuchProcess, OSError):
                continue
            resident += status.get("VmRSS", 0)
            anonymous += status.get("RssAnon", 0)
            name = "peak_bytes" if own else "peak_child_bytes"
            setattr(self.cost, name, max(getattr(self.cost, name), status.get("VmHWM", 0)))
        self.cost.wall_s = time.monotonic() - self._started
        self.cost.processor_s = sum(self._processor.values())
        self.cost.seen_bytes = max(self.cost.seen_bytes, resident)
        self.cost.seen_anonymous_bytes = max(self.cost.seen_anonymous_bytes, anonymous)
        self._stage_peak = max(self._stage_peak, resident)
        self._note_stages()

    def _note_stages(self) -> None:
        for name in self._ended_stages():
            before = self.cost.stages
            wall = time.monotonic() - self._started - sum(stage.wall_s for stage in before)
            processor = sum(self._processor.values()) - sum(stage.processor_s for stage in before)
            before.append(Stage(name, wall, processor, self.cost.peak_bytes, self._stage_peak))
            self._stage_peak = 0

    def _ended_stages(self) -> Iterator[str]:
        with self.log.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            found = _STAGE.match(line)
            if found:
                yield found["name"]

    def _children(self) -> list[psutil.Process]:
        try:
            return self._whole.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _end(self) -> None:
        cost = self.cost
        cost.wall_s = time.monotonic() - self._started
        self._note_stages()
        # What the kernel adds up of the dead is exact; one process is watched at a time.
        cost.processor_s = _processor_of_children() - self._before
        cost.exit_code = self.process.returncode
        left = cost.wall_s - sum(stage.wall_s for stage in cost.stages)
        used = cost.processor_s - sum(stage.processor_s for stage in cost.stages)
        cost.stages.append(Stage("(the rest)", left, used, cost.peak_bytes, self._stage_peak))


def _processor_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _status(pid: int) -> dict[str, int]:
    """Return the sizes in /proc/PID/status, bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    named = (line.partition(":") for line in lines if line.endswith(" kB"))
    return {name: 1024 * int(value.split()[0]) for name, _, value in named}


def named(arguments: Sequence[str]) -> list[str]:
    """Return ``arguments`` with the last part of every path."""
    return [Path(part).name if Path(part).is_absolute() else part for part in arguments]


def glmexport(*arguments: object) -> list[str]:
    """Return the command line of this checkout's ``glmexport``."""
    return [sys.executable, "-m", "glmexport", *map(str, arguments)]
