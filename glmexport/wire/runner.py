"""The common part of all ways to a device: the program that is carried there, and its events that are followed."""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import glmexport
from glmexport.foundation.errors import MachineError
from glmexport.foundation.progress import Progress, Track
from glmexport.foundation.untrusted import DocumentLimits, parse

PROGRAM = "program.pyz"
_PACKAGE = "glmexport.wire.device"
_ENGINE = "glmexport.engine.core"
_STANDALONE = "glmexport.wire.standalone"
#: The directory that the package is in.
_ROOT = Path(glmexport.__file__).parents[1]
_MAIN = "import sys\n\nfrom {} import main\n\nsys.exit(main(sys.argv[1:]))\n"
#: Date of every entry, so that the program is the same bytes whenever it is packed.
_DATE = (1980, 1, 1, 0, 0, 0)
#: Seconds between checks whether anybody still waits.
_LOOK = 0.5
_LABELS = {"verified": "Checking files", "round": "Speed", "prompt": "Free answers", "text": "Texts"}
#: Most bytes of a line of the program's output that is read.
LINE_BYTES = 1 << 16
#: Most bytes of a line that is an event: the last lines of a server's ledger are in one.
LONGEST_EVENT = 1 << 18
_LINE_LIMITS = DocumentLimits(size=LONGEST_EVENT, depth=16, values=50_000)
#: Seconds without a message after which a device is given up.
SILENCE_S = 3600.0


class Runner(Protocol):
    """A way to a device."""

    def __call__(self, job: Path, results: Path, progress: Progress) -> None:
        """Let the device answer the job in the folder ``job`` into ``results``, which may have some answers already.

        Advancing ``progress`` may raise if nobody waits any more.

        Raises:
            MachineError: the device could not be reached, or did not finish.
        """


def program() -> bytes:
    """Return the device's program as one file that Python runs."""
    own = (f"{_PACKAGE}.{name}" for name in ("answers", "facts", "graphs"))
    # These are the very files that serve here.
    files = sorted((_ROOT / Path(*_ENGINE.split("."))).glob("[!_]*.py"))
    return packed(f"{_PACKAGE}.__main__", *own, *(f"{_ENGINE}.{file.stem}" for file in files), _STANDALONE)


def packed(main: str, *modules: str) -> bytes:
    """Return a zip archive of sources that Python runs: ``main`` of the module of that name, and what it imports."""
    contents = {"__main__.py": _MAIN.format(main)}
    for module in (main, *modules):
        *packages, _ = parts = module.split(".")
        for depth in range(1, len(packages) + 1):
            contents.setdefault(f"{'/'.join(packages[:depth])}/__init__.py", "")
        path = "/".join(parts) + ".py"
        contents[path] = (_ROOT / path).read_text(encoding="utf-8")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in sorted(contents.items()):
            archive.writestr(zipfile.ZipInfo(path, _DATE), content)
    return buffer.getvalue()


class Ended(MachineError):
    """The error of a program that ended, or whose line was cut, before it said that it was done."""


class ProgramError(MachineError):
    """The error that the program reports, and its ``kind``."""

    def __init__(self, kind: str, message: str, next_step: str) -> None:
        super().__init__(message, next_step=next_step)
        self.kind = kind


async def follow(
    readline: Callable[[], Awaitable[bytes]], progress: Progress, who: str, silence: float = SILENCE_S
) -> None:
    """Show the program's events until it is done; see ``events``."""
    async for _ in events(readline, progress, who, silence):
        pass


async def events(
    readline: Callable[[], Awaitable[bytes]],
    progress: Progress,
    who: str,
    silence: float = SILENCE_S,
    labels: Mapping[str, str] = _LABELS,
    begin: str = "Reaching the device",
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the program's events until it is done.

    Args:
        readline: a function that reads its next line, empty at the end of its output.
        progress: the observer of the events.
        who: the device, for messages.
        silence: seconds without a line after which it is given up.
        labels: the names of work whose events have an index, by the event.
        begin: the label that is shown before the first event.

    Raises:
        Ended: no more events, or silence.
        ProgramError: the program reports an error.
    """
    with ExitStack() as stack:
        shown = _Shown(stack, progress, labels, begin)
        while True:
            line = await _patient(readline, shown, who, silence)
            if not line:
                raise Ended(f"{who}: the run ended before it was done.", next_step="Run the same command again.")
            event = _event(line)
            kind = event.get("event")
            if kind == "done":
                return
            if kind == "error":
                message, next_step = (str(event.get(name, "")) for name in ("message", "next_step"))
                raise ProgramError(
                    str(event.get("kind")), f"{who}: {message}", next_step or "Run the same command again."
                )
            shown.show(event)
            yield event


def _event(line: bytes) -> dict[str, Any]:
    """Return the event of a line; other lines, which a device may print at will, are skipped."""
    try:
        event = parse(line, _LINE_LIMITS)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


async def _patient(readline: Callable[[], Awaitable[bytes]], shown: _Shown, who: str, silence: float) -> bytes:
    """Return the next line, as long as somebody waits for it."""
    reading = asyncio.ensure_future(readline())
    waited = 0.0
    try:
        while not (await asyncio.wait([reading], timeout=_LOOK))[0]:
            shown.look()
            waited += _LOOK
            if waited >= silence:
                raise Ended(f"{who} has not said a word for {silence:.0f} s.", next_step="Look what it does.")
        return reading.result()
    except (ValueError, asyncio.IncompleteReadError) as error:
        # A stream reports a line without an end so.
        raise Ended(f"{who} said a line that is too long: {error}.", next_step="Look what it prints.") from error
    finally:
        reading.cancel()


class _Shown:
    """Events shown as bars, one after the other."""

    def __init__(self, stack: ExitStack, progress: Progress, labels: Mapping[str, str], begin: str) -> None:
        self._stack, self._progress, self._labels = stack, progress, labels
        self._kind = ""
        self._track: Track = stack.enter_context(progress.track(begin, 1))
        self._done = 0

    def show(self, event: dict[str, Any]) -> None:
        """Advance to the event's index."""
        kind, index, of = str(event.get("event")), event.get("index"), event.get("of", 1)
        if kind not in self._labels or not isinstance(index, int) or not isinstance(of, int):
            return
        if kind != self._kind:
            self._stack.close()
            self._kind, self._done = kind, 0
            self._track = self._stack.enter_context(self._progress.track(self._labels[kind], of))
        self._track.advance(max(0, index - self._done), f"round {index}" if kind == "round" else "")
        self._done = max(self._done, index)

    def look(self) -> None:
        """Raise if nobody waits any more."""
        self._track.advance(0)
