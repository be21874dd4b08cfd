"""Protocols by which work reports its progress without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Track(Protocol):
    """One piece of work under way."""

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """Count ``steps`` more as done; ``detail`` replaces the text beside the bar."""


class Progress(Protocol):
    """The receiver of a stage's progress and remarks."""

    def track(self, label: str, total: int) -> AbstractContextManager[Track]:
        """Return a context manager around ``total`` steps of work called ``label``."""
        ...

    def remark(self, text: str) -> None:
        """Show a line that a person should see, such as a fallback that was taken."""


class _SilentTrack:
    def advance(self, steps: int = 1, detail: str = "") -> None:
        pass


class Silent:
    """A progress that nobody watches, for library use and tests. Remarks are kept in ``remarks``."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Track]:
        """Accept steps, and show nothing."""
        yield _SilentTrack()

    def remark(self, text: str) -> None:
        """Keep the remark in ``remarks``."""
        self.remarks.append(text)
