"""The one thread that owns the model: requests wait in a bounded queue, and those begun take turns token by token."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from glmexport.serving.answer import Answer, Failed, FreeTurns, GuidedTurns, Turns
from glmexport.serving.kept import Kept
from glmexport.serving.metrics import Metrics
from glmexport.serving.model import Model


class Full(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class EngineOptions:
    """How the engine works.

    ``parallel``: answers that take turns, and sequences that are held in memory. ``waiting``: requests that may wait
    beside them. ``guesses``: tokens guessed at a time, 0 for none. ``reuse``: whether a prompt goes on with the
    sequence of an earlier request that it begins with.
    """

    threads: int
    parallel: int = 4
    waiting: int = 64
    guesses: int = 0
    reuse: bool = True


class Engine:
    """Answers from the bundle in ``directory``.

    ``loaded`` is called in the engine's thread once the model is in memory, ``broken`` when it cannot be.
    """

    def __init__(
        self,
        directory: Path,
        options: EngineOptions,
        metrics: Metrics,
        loaded: Callable[[], None],
        broken: Callable[[Exception], None],
    ) -> None:
        self._directory = directory
        self._options = options
        self._metrics = metrics
        self._loaded = loaded
        self._broken = broken
        self._waiting: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.ready = False
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether its thread is there."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Load the model, then work."""
        self._thread.start()

    def submit(self, answer: Answer) -> None:
        """Let an answer be given; it is told parts and its end from the engine's thread.

        Raises:
            Full: too many wait.
            Closed: the engine ends, or could not load the model.
        """
        with self._changed:
            if self._closed:
                raise Closed
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.cancelled)
            if len(self._waiting) >= self._options.waiting:
                raise Full
            self._waiting.append(answer)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def close(self) -> None:
        """Take nothing more, and end when all that was taken is answered or cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread; whether it ended."""
        self._thread.join(timeout)
        return not self.alive

    def _work(self) -> None:
        try:
            model = Model(self._directory, self._options.threads)
        except Exception as error:
            self.close()
            for answer in self._waiting:
                answer.tell(Failed(error))
            self._broken(error)
            return
        self.ready = True
        self._loaded()
        _Shift(model, self._options, self._metrics, self._next).work()

    def _next(self, idle: bool) -> Answer | None:
        """The answer to begin next. Where ``idle``, wait for one; None then: there will be none."""
        with self._changed:
            while True:
                while self._waiting:
                    answer = self._waiting.popleft()
                    self._metrics.waiting.set(len(self._waiting))
                    if not answer.cancelled:
                        return answer
                if not idle or self._closed:
                    return None
                self._changed.wait()


class _Shift:
    """The engine's work while the model is in memory."""

    def __init__(
        self, model: Model, options: EngineOptions, metrics: Metrics, following: Callable[[bool], Answer | None]
    ) -> None:
        self._model = model
        self._options = options
        self._metrics = metrics
        self._following = following
        self._running: deque[Turns] = deque()
        self._kept = Kept(model.chunk)

    def work(self) -> None:
        """Until no answer follows."""
        while True:
            while len(self._running) < self._options.parallel:
                answer = self._following(not self._running)
                if answer is None:
                    break
                self._begin(answer)
            if not self._running:
                return
            self._metrics.running.set(len(self._running))
            turns = self._running.popleft()
            if self._turn(turns):
                self._running.append(turns)
            self._metrics.running.set(len(self._running))

    def _begin(self, answer: Answer) -> None:
        answer.timing.begun = time.monotonic()
        try:
            self._running.append(self._turns(answer))
        except Exception as error:
            self._fail(answer, error)

    def _turns(self, answer: Answer) -> Turns:
        order, model = answer.order, self._model
        length = len(order.prompt) + order.max_tokens
        if order.guide:
            return GuidedTurns(answer, model.guided(length, order.guide, order.sampling), model.chunk)
        sequence = self._kept.take(order.prompt, length) if self._options.reuse else None
        if sequence is None:
            self._kept.drop(self._options.parallel - len(self._running) - 1)
            sequence = model.begin(length)
        else:
            self._metrics.reused_tokens.inc(len(sequence.tokens))
        return FreeTurns(answer, sequence, model.chunk, min(self._options.guesses, model.short_step - 1))

    def _turn(self, turns: Turns) -> bool:
        """Let an answer have its turn; whether it goes on."""
        answer = turns.answer
        if answer.cancelled:
            self._metrics.requests.labels("cancelled").inc()
            self._leave(turns)
            return False
        try:
            reason = turns.turn()
        except Exception as error:
            self._fail(answer, error)
            return False
        if reason is None:
            return True
        self._leave(turns)
        self._metrics.answered(answer, reason)
        answer.end(reason)
        return False

    def _leave(self, turns: Turns) -> None:
        """Keep what was computed."""
        if isinstance(turns, FreeTurns):
            self._metrics.guessed(turns.drafted, turns.accepted)
            if self._options.reuse:
                self._kept.keep(turns.sequence)
                self._kept.drop(self._options.parallel - len(self._running))

    def _fail(self, answer: Answer, error: Exception) -> None:
        self._metrics.requests.labels("failed").inc()
        answer.tell(Failed(error))
