"""Answers that follow a grammar: the grammars of requests are handled in processes of their own, which have limits.

No grammar is compiled here, nor are its tokens found here. One that takes too long or too much there is refused, and
ends nothing but its process. A grammar is tried when it comes, before the request waits for its turn.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from glmexport.bundle.genai_config import GenaiConfig
from glmexport.engine.sampling import Sampling
from glmexport.foundation.errors import InputError, MachineError

_PROGRAM = Path(__file__).with_name("guide_program.py")
_GRAPH = Path(__file__).with_name("guide.onnx")
#: The bytes in the graph that stand, once, for the size of the vocabulary.
PLACEHOLDER = b"VOCABULA"
#: The first byte of a message to the process.
_GRAMMAR, _LOGITS = b"g", b"l"
#: Most bytes of memory of a grammar, and most seconds: for its process to start, to compile it, for a token, for all.
MEMORY = 512 << 20
START_S, COMPILE_S, TOKEN_S, ANSWER_S = 120.0, 3.0, 2.0, 60.0
#: A process that has worked for so long takes no other grammar; one that works for so much longer is ended.
_WORN_S, _CPU_S = 60.0, 300
#: Number of processes that are kept for later answers: one takes seconds to start, and 250 MiB with GLM's vocabulary.
_KEPT = 4
#: Number of grammars that are tried at a time, and of those that wait for it.
_TRIED, _WAITING = 2, 6
#: Number of grammars that are remembered as compiling.
_KNOWN = 256
#: Seconds that the engine waits for a token before others have their turn.
_GLANCE_S = 0.005
#: The variables in the environment of a process: no key, no credential, no socket of the service manager's.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")


@dataclass(frozen=True)
class Guide:
    """The grammar that an answer must follow."""

    kind: Literal["json_schema"]
    text: str


class Crowded(Exception):
    """The error of a grammar that comes when as many wait to be tried as may wait."""


@dataclass(frozen=True)
class Chosen:
    """A token that was chosen; None: the answer has ended. ``done``: none follows."""

    token: int | None
    done: bool


class GuideProcess:
    """A process for grammars, which has one at a time."""

    def __init__(self, bundle: Path, graph: bytes) -> None:
        self._ours, theirs = Pipe()
        command = [sys.executable, "-I", _PROGRAM, theirs.fileno(), bundle, MEMORY, _CPU_S]
        kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                [*map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**kept, "OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"},
                cwd="/",
                start_new_session=True,
            )
        self._due = self._sent = 0.0
        self._worked_s = 0.0
        self._started = False
        self._send(graph, START_S)

    def compile(self, guide: Guide, sampling: Sampling, tokens: int) -> None:
        """Begin to compile; ``poll`` says when it is done."""
        options: dict[str, Any] = {"do_sample": False}
        if not sampling.greedy:
            options = {
                "do_sample": True,
                "top_k": 0,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                # A seed has 31 bits there.
                "random_seed": sampling.seed % 2**31,
            }
        asked = {"kind": guide.kind, "text": guide.text, "options": options, "tokens": tokens, "lead": 0}
        self._send(_GRAMMAR + json.dumps(asked).encode(), COMPILE_S if self._started else None)

    def choose(self, logits: NDArray[np.float32]) -> None:
        """Begin to choose a token by ``logits`` [V]; ``poll`` says which."""
        self._send(_LOGITS + logits.astype(np.float32).tobytes(), TOKEN_S)

    def poll(self, wait_s: float) -> bytes | None:
        """Return the reply to what was sent; None: there is none within ``wait_s``.

        Raises:
            InputError: the grammar is not valid, or took more than it may.
        """
        try:
            if not self._ours.poll(wait_s):
                if time.monotonic() > self._due:
                    raise _excess("time")
                return None
            said = self._ours.recv_bytes()
        except (OSError, EOFError) as error:
            if not self._started:
                raise MachineError(
                    f"The process for grammars ended with {self._process.wait()} before it was ready.",
                    next_step="Look at the memory and the processes that the server may have.",
                ) from error
            raise _excess("memory or time") from error
        now = time.monotonic()
        self._worked_s += now - self._sent
        self._sent = now
        if not self._started:
            self._started, self._due = True, now + COMPILE_S
            return None
        if said.startswith(b"!"):
            reason = said[1:].decode(errors="replace")
            raise InputError(f"An answer cannot be held to this schema: {reason}.", next_step="Simplify it.")
        return said

    @property
    def worn(self) -> bool:
        """Whether the process has worked so long that it takes no other grammar."""
        return self._worked_s > _WORN_S

    def wait(self) -> bytes:
        """Return the reply, after as much time as it may take; see ``poll``."""
        while (said := self.poll(0.1)) is None:
            pass
        return said

    def kill(self) -> None:
        """End the process; answers that wait for it are told."""
        self._process.kill()

    def close(self) -> None:
        """End the process, and wait for its end."""
        self.kill()
        with suppress(OSError):
            self._ours.close()
        self._process.wait()

    def _send(self, data: bytes, seconds: float | None) -> None:
        self._sent = time.monotonic()
        if seconds is not None:
            self._due = self._sent + seconds
        try:
            self._ours.send_bytes(data)
        except OSError as error:
            # ``poll`` reports a process that did not start.
            if self._started:
                raise _excess("memory or time") from error


def _excess(what: str) -> InputError:
    return InputError(
        f"The schema is too complex: it takes more {what} than a grammar may have.",
        next_step="Take fewer branches, patterns and repetitions.",
    )


class Held:
    """The tokens of an answer, chosen among those that its grammar allows."""

    def __init__(
        self,
        process: GuideProcess,
        guide: Guide,
        sampling: Sampling,
        tokens: int,
        give_back: Callable[[GuideProcess], None],
    ) -> None:
        self._process = process
        self._give_back = give_back
        self._left_s = ANSWER_S
        process.compile(guide, sampling, tokens)
        self._compiled = self._asked = False

    def choose(self, logits: NDArray[np.float32]) -> Chosen | None:
        """Return a token by ``logits`` [V]; None: not yet, and the same logits are to be given again.

        Raises:
            InputError: the grammar took more than it may.
        """
        begun = time.monotonic()
        said = None
        if self._compiled and not self._asked:
            self._process.choose(logits)
            self._asked = True
        said = self._process.poll(_GLANCE_S)
        if self._asked:
            self._left_s -= time.monotonic() - begun
            if self._left_s < 0:
                raise _excess("time")
        if said is None:
            return None
        if not self._compiled:
            self._compiled = True
            return None
        self._asked = False
        return Chosen(**json.loads(said))

    def close(self) -> None:
        """End the choice; a process that waits for logits is kept for another answer."""
        if self._compiled and not self._asked:
            self._give_back(self._process)
        else:
            self._process.close()


class Guides:
    """Processes for the grammars of requests to the bundle in ``directory``, which onnxruntime-genai runs.

    ``config``: the settings that it runs the bundle by.
    """

    def __init__(self, directory: Path, config: GenaiConfig) -> None:
        self._directory = directory
        self._graph = guide_graph(config.vocabulary_size)
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()
        self._spare: list[GuideProcess] = []
        self._live = WeakSet[GuideProcess]()
        self._tried = 0
        #: Whether no more grammars are taken.
        self.closed = False
        self._pool = ThreadPoolExecutor(_TRIED, "grammars")

    def tried(self, guide: Guide) -> Future[None]:
        """Return a future that is done when ``guide`` is known to compile, or has the InputError that says why not.

        Raises:
            Crowded: too many wait to be tried.
        """
        with self._lock:
            if self.closed or self._tried >= _TRIED + _WAITING:
                raise Crowded
            self._tried += 1
            return self._pool.submit(self._try, guide)

    def begin(self, guide: Guide, sampling: Sampling, tokens: int) -> Held:
        """Return the choice of an answer of at most so many ``tokens`` that follows ``guide``."""
        return Held(self._take(), guide, sampling, tokens, self._give_back)

    def close(self) -> None:
        """End all processes, and take no more grammars."""
        with self._lock:
            self.closed = True
            for process in self._live:
                process.kill()
            for process in self._spare:
                process.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _try(self, guide: Guide) -> None:
        try:
            digest = hashlib.sha256(guide.text.encode()).digest()
            with self._lock:
                if digest in self._known:
                    self._known.move_to_end(digest)
                    return
            process = self._take()
            try:
                process.compile(guide, Sampling(0), 1)
                process.wait()
            except (InputError, MachineError):
                process.close()
                raise
            self._give_back(process)
            with self._lock:
                self._known[digest] = None
                if len(self._known) > _KNOWN:
                    self._known.popitem(last=False)
        finally:
            with self._lock:
                self._tried -= 1

    def _take(self) -> GuideProcess:
        with self._lock:
            process = self._spare.pop() if self._spare else None
        process = process or GuideProcess(self._directory, self._graph)
        with self._lock:
            self._live.add(process)
        return process

    def _give_back(self, process: GuideProcess) -> None:
        """Keep a process, if few are kept, so that the next answer need not wait for one."""
        with self._lock:
            if len(self._spare) < _KEPT and not self.closed and not process.worn:
                self._spare.append(process)
                return
        process.close()


def guide_graph(vocabulary: int) -> bytes:
    """Return a model without weights that computes logits [batch, length, ``vocabulary``] of zero.

    It is kept as a file in which the size of the vocabulary, 8 bytes of an initializer, is left to be filled in.
    """
    return _GRAPH.read_bytes().replace(PLACEHOLDER, vocabulary.to_bytes(8, "little"))
