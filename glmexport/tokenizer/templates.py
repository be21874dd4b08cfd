"""Rendering of chat templates as transformers does it, in a process of its own that ends when one takes too much."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmexport.foundation.errors import CheckpointError, MachineError

_PROGRAM = Path(__file__).with_name("template_process.py")
#: CPU seconds and bytes of memory for one conversation.
CPU_S, MEMORY_BYTES = 3, 1 << 29
#: Bytes of the file of a template; those of GLM models are of 10 KB.
TEMPLATE_LIMIT_BYTES = 1 << 20
#: Seconds after which a process that does not answer is ended, on a machine however busy.
_PATIENCE_S = 120
_ENVIRONMENT = frozenset(
    {
        "APPDATA", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH",
        "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "TZ", "USERPROFILE", "VIRTUAL_ENV",
    }
)  # fmt: skip


class TemplateFailed(Exception):
    """The reason why a template did not render a conversation; its text completes a sentence behind a colon."""


class _Process:
    """The process, started when it is first needed, and again when it ended. One conversation at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, request: bytes) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            TemplateFailed: the process ended instead.
            OSError: it cannot be started.
        """
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            patience = threading.Timer(_PATIENCE_S, process.kill)
            patience.daemon = True
            patience.start()
            try:
                process.stdin.write(request + b"\n")
                process.stdin.flush()
                line = process.stdout.readline()
                answered = line.endswith(b"\n")
            except BrokenPipeError:
                answered = False
            finally:
                patience.cancel()
            if not answered:
                self._end()
                raise TemplateFailed(f"it takes longer than {CPU_S} s, or ends the process that it runs in")
        answer: dict[str, Any] = json.loads(line.decode("utf-8", "surrogatepass"))
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        # After a fork the process is another's.
        if self._running is None or self._owner != os.getpid() or self._running.poll() is not None:
            self._end()
            self._running = subprocess.Popen(  # noqa: S603 - this program's own
                # -P: the folder of the program is not searched for modules.
                [sys.executable, "-P", str(_PROGRAM), str(CPU_S), str(MEMORY_BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Of what is in the environment, keys and tokens are none of a template's business.
                env={name: value for name, value in os.environ.items() if name in _ENVIRONMENT},
                # Ctrl-C is for whoever asks; this one ends with its stdin.
                start_new_session=True,
            )
            self._owner = os.getpid()
        return self._running

    def _end(self) -> None:
        process, self._running = self._running, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def end(self) -> None:
        """End it, when this program ends."""
        with self._lock:
            self._end()


_PROCESS = _Process()
atexit.register(_PROCESS.end)


def render_template(
    where: str, template: str, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object]
) -> str:
    """Return what ``template`` makes of a conversation.

    Args:
        where: The template's file, for messages.
        template: Its source.
        messages: Tables of JSON values.
        variables: JSON values by the name that the template knows them by.

    Raises:
        CheckpointError: it fails, or passes a limit of time, memory or length; carries the template's own message.
        MachineError: the process that it runs in cannot be started.
    """
    request = {"template": template, "messages": list(messages), "variables": dict(variables)}
    try:
        answer = _PROCESS.render(json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        if "text" in answer:
            return str(answer["text"])
        raise TemplateFailed(answer["failed"])
    except TemplateFailed as failure:
        raise CheckpointError(
            f"The chat template of {where} failed: {failure}.",
            next_step="Check the roles and the order of the messages, and the template's variables.",
        ) from failure
    except OSError as error:
        raise MachineError(
            f"The process for chat templates cannot be started: {error.strerror}.",
            next_step="Check the limits of memory and processes.",
        ) from error
