"""The wall and processor seconds that parts of a piece of work take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Value = TypeVar("Value")


class Stopwatch:
    """Seconds by part; while one part runs inside another, they are those of the inner one alone."""

    def __init__(self) -> None:
        self._parts: dict[str, list[float]] = {}
        self._running: list[str] = []
        self._last = (0.0, 0.0)

    def begin(self) -> dict[str, list[float]]:
        """Begin at zero, and return wall and processor seconds by part, which grow as parts run."""
        self._parts = {}
        return self._parts

    @contextmanager
    def running(self, part: str) -> Iterator[None]:
        """Count the time inside for ``part``."""
        self._count()
        self._running.append(part)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def through(self, part: str, values: Iterator[Value]) -> Iterator[Value]:
        """Yield ``values``, and count for ``part`` the time that it takes to make each."""
        while True:
            with self.running(part):
                try:
                    value = next(values)
                except StopIteration:
                    return
            yield value

    def _count(self) -> None:
        now = (time.monotonic(), time.process_time())
        if self._running:
            part = self._parts.setdefault(self._running[-1], [0.0, 0.0])
            for index in (0, 1):
                part[index] += now[index] - self._last[index]
        self._last = now
