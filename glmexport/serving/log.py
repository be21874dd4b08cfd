"""The server's log: kinds and places of errors. Nothing of a request or an answer: messages of errors have it in.

A library's error may quote what it could not read, and a record of a library's whatever it was working on. So of an
error its type is logged and where it was raised, and of a library's record where it comes from.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

OURS = "glmexport"

_log = logging.getLogger("glmexport.serving")
#: Places of an error, innermost first, and errors that led to each other.
_PLACES, _ERRORS = 8, 4


def described(error: BaseException) -> str:
    """Return the types of an error and of those that led to it, and where each was raised; never their messages."""
    return "; after ".join(_described(each) for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    for _ in range(_ERRORS):
        if each is None:
            return
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _described(error: BaseException) -> str:
    places, at = list[str](), error.__traceback__
    while at:
        places.insert(0, f"{_short(at.tb_frame.f_code.co_filename)}:{at.tb_lineno}")
        at = at.tb_next
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} at {' < '.join(places[:_PLACES]) or 'an unknown place'}"


def _short(file: str) -> str:
    return "/".join(Path(file).parts[-2:])


class Formatter(logging.Formatter):
    """A formatter that shows our records as they are, and of others only the place; errors are ``described``."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, as logging calls it."""
        ours = record.name.partition(".")[0] == OURS
        said = record.getMessage() if ours else f"{record.name} at {_short(record.pathname)}:{record.lineno}."
        error = record.exc_info[1] if record.exc_info else None
        return f"{record.levelname} {said}" + (f" {described(error)}." if error else "")


@contextmanager
def logged_to(stream: TextIO) -> Generator[None]:
    """Log to ``stream``, errors that nobody catches and warnings as well, until the context is left."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Formatter())
    root = logging.getLogger()
    handlers, level, hooks = root.handlers[:], root.level, (threading.excepthook, sys.unraisablehook)
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    # What strangers send is no business of the log's.
    for noisy in ("uvicorn.error", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.captureWarnings(True)
    threading.excepthook = lambda failed: _tell("A thread", failed.exc_value)
    sys.unraisablehook = lambda failed: _tell("What nobody waits for", failed.exc_value)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
        threading.excepthook, sys.unraisablehook = hooks


def on_loop_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error of a callback, as an event loop calls it; the loop's own message has the arguments."""
    _tell("A callback", context.get("exception"))


def _tell(what: str, error: BaseException | None) -> None:
    _log.error("%s failed: %s.", what, described(error) if error else "no error")
