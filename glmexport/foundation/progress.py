"""How long work tells its progress without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Track(Protocol):
    """One piece of work under way."""

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """``steps`` more are done; ``detail`` replaces the text beside the bar."""


class Progress(Protocol):
    """Where a stage reports its work and its remarks."""

    def track(self, label: str, total: int) -> AbstractContextManager[Track]:
        """A context manager around ``total`` steps of work called ``label``."""
        ...

    def remark(self, text: str) -> None:
        """A line that a person should see, such as a fallback that was taken."""


class _SilentTrack:
    def advance(self, steps: int = 1, detail: str = "") -> None:
        pass


class Silent:
    """Progress that nobody watches: for library use and tests. Remarks are kept in ``remarks``."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Track]:
        """Steps that nobody counts."""
        yield _SilentTrack()

    def remark(self, text: str) -> None:
        """Keep it."""
        self.remarks.append(text)
