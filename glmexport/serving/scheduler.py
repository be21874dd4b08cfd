"""The one thread that owns the model: requests wait in a bounded queue, and begun ones take turns token by token."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from glmexport.bundle.bundle import Bundle
from glmexport.engine.core.sequence import Engine, Sequence
from glmexport.engine.kept import Kept, room_for
from glmexport.engine.opening import open_engine
from glmexport.engine.sampling import Sampling
from glmexport.serving.answer import Failed, FreeTurns, GuidedTurns, Order, PendingAnswer, Reason, Turns
from glmexport.serving.guides import Guides
from glmexport.serving.metrics import Metrics
from glmexport.serving.text import AnswerText, Decoder

#: Tokens of the prompt that is computed before a server is ready, and of the answer to it.
_WARM_UP, _WARM_UP_TOKENS = 16, 2


class Full(Exception):
    """The error of a request that finds as many waiting as may wait."""


class Closed(Exception):
    """The error of a request that comes when the scheduler takes no more."""


@dataclass(frozen=True)
class SchedulerOptions:
    """The settings of a scheduler.

    ``parallel``: answers that take turns, and sequences that are held in memory. ``waiting``: requests that may wait
    beside them. ``guesses``: tokens guessed at a time, 0 for none. ``reuse``: whether a prompt goes on with the
    sequence of an earlier request that it begins with. ``batch``: whether the next tokens of all are computed together.
    """

    threads: int
    parallel: int = 4
    waiting: int = 64
    guesses: int = 0
    reuse: bool = True
    batch: bool = False


class Scheduler:
    """A scheduler of answers from a ``bundle``, computed by one thread.

    ``loaded`` is called in that thread once the model is in memory, ``broken`` when it cannot be, or when the
    thread fails outside of any single answer. ``guides`` hold answers to grammars.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: SchedulerOptions,
        metrics: Metrics,
        loaded: Callable[[], None],
        broken: Callable[[Exception], None],
        guides: Guides | None = None,
    ) -> None:
        self._guides = guides
        self._bundle = bundle
        self._options = options
        self._metrics = metrics
        self._loaded = loaded
        self._broken = broken
        self._waiting: deque[PendingAnswer] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.ready = False
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread of the scheduler runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Load the model, then work."""
        self._thread.start()

    def submit(self, answer: PendingAnswer) -> None:
        """Add an answer to the queue; it is told parts and its end from the scheduler's thread.

        Raises:
            Full: too many wait.
            Closed: the scheduler ends, or could not load the model.
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
        """Take no more requests, and end when all that were taken are answered or cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread, and return whether it ended."""
        self._thread.join(timeout)
        return not self.alive

    def _work(self) -> None:
        try:
            options = self._options
            batch = options.parallel if options.batch else 0
            engine = open_engine(self._bundle, options.threads, batch=batch)
            _warm_up(engine, self._bundle)
            self.ready = True
            self._loaded()
            _Shift(engine, options, self._metrics, self._next, self._guides).work()
        except Exception as error:
            # Without this thread nobody is answered any more, so the server ends with the error.
            self.ready = False
            self.close()
            for answer in self._waiting:
                answer.tell(Failed(error))
            self._broken(error)

    def _next(self, idle: bool) -> PendingAnswer | None:
        """Return the answer to begin next. If ``idle``, wait for one; None then means that there will be none."""
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


def _warm_up(engine: Engine, bundle: Bundle) -> None:
    """Give an answer that nobody asked for, so that the first one finds memory and code ready, as later ones do."""
    if engine.context_length < _WARM_UP + _WARM_UP_TOKENS:
        return
    prompt = (min(engine.ends),) * _WARM_UP
    order = Order(prompt, max_tokens=_WARM_UP_TOKENS, sampling=Sampling(top_p=0.5))
    answer = PendingAnswer(order, AnswerText(Decoder(bundle.tokenizer), ()), lambda _: None, lambda _: None)
    turns = FreeTurns(answer, engine.begin(len(prompt) + order.max_tokens), engine.chunk)
    while turns.turn() is None:
        pass
    turns.close()


class _Shift:
    """The work of a scheduler while the bundle is in memory."""

    def __init__(
        self,
        engine: Engine,
        options: SchedulerOptions,
        metrics: Metrics,
        following: Callable[[bool], PendingAnswer | None],
        guides: Guides | None,
    ) -> None:
        self._guides = guides
        self._engine = engine
        self._options = options
        self._metrics = metrics
        self._following = following
        self._running: deque[Turns] = deque()
        self._kept = Kept(engine.chunk)

    def work(self) -> None:
        """Work until no answer follows."""
        while True:
            while len(self._running) < self._options.parallel:
                answer = self._following(not self._running)
                if answer is None:
                    break
                self._begin(answer)
            if not self._running:
                return
            self._metrics.running.set(len(self._running))
            self._turn(self._group())
            self._metrics.running.set(len(self._running))

    def _begin(self, answer: PendingAnswer) -> None:
        answer.timing.begun = time.monotonic()
        try:
            self._running.append(self._turns(answer))
        except Exception as error:
            self._fail(answer, error)

    def _turns(self, answer: PendingAnswer) -> Turns:
        order, engine = answer.order, self._engine
        length = len(order.prompt) + order.max_tokens
        if order.guide:
            assert self._guides is not None
            sequence = self._new(length)
            try:
                held = self._guides.begin(order.guide, order.sampling, order.max_tokens)
            except BaseException:
                sequence.close()
                raise
            return GuidedTurns(answer, sequence, held, engine.chunk)
        taken = self._kept.take(order.prompt, length, order.key) if self._options.reuse else None
        sequence = self._new(length) if taken is None else taken
        if taken is not None:
            self._metrics.reused_tokens.inc(len(sequence.tokens))
        return FreeTurns(answer, sequence, engine.chunk, min(self._options.guesses, engine.short_step - 1))

    def _new(self, length: int) -> Sequence:
        """Return a new sequence for so many tokens; where too many others are kept, the oldest makes room for it."""
        self._kept.drop(self._options.parallel - len(self._running) - 1)
        return self._engine.begin(room_for(length, self._engine.context_length))

    def _group(self) -> list[Turns]:
        """Return the answers whose turn it is: the first one and, if the engine batches, all others that step."""
        first = self._running.popleft()
        if not self._engine.batched or not _steps(first):
            return [first]
        others = [turns for turns in self._running if _steps(turns)]
        self._running = deque(turns for turns in self._running if not _steps(turns))
        return [first, *others]

    def _turn(self, group: list[Turns]) -> None:
        """Let a group have its turn; those that go on run again."""
        for turns in group:
            if turns.answer.cancelled:
                self._metrics.requests.labels("cancelled").inc()
                self._leave(turns)
        group = [turns for turns in group if not turns.answer.cancelled]
        try:
            reasons = self._reasons(group)
        except Exception as error:
            for turns in group:
                self._fail(turns.answer, error)
                turns.close()
            return
        for turns, reason in zip(group, reasons, strict=True):
            if reason is None:
                self._running.append(turns)
                continue
            self._leave(turns)
            self._metrics.answered(turns.answer, reason)
            turns.answer.end(reason)

    def _reasons(self, group: list[Turns]) -> list[Reason | None]:
        """Take the turn of a group, and return how each of its answers ended, if it did."""
        free = [turns for turns in group if isinstance(turns, FreeTurns)]
        if len(free) < 2:
            return [turns.turn() for turns in group]
        tokens = [turns.following for turns in free if turns.following is not None]
        rows = self._engine.step([turns.sequence for turns in free], tokens)
        return [turns.take(row) for turns, row in zip(free, rows, strict=True)]

    def _leave(self, turns: Turns) -> None:
        """Keep the sequence of an answer, or free it."""
        if isinstance(turns, FreeTurns):
            self._metrics.guessed(turns.drafted, turns.accepted)
            if self._options.reuse:
                self._kept.keep(turns.sequence, turns.answer.order.key)
                self._kept.drop(self._options.parallel - len(self._running))
            else:
                turns.close()
        else:
            turns.close()

    def _fail(self, answer: PendingAnswer, error: Exception) -> None:
        self._metrics.requests.labels("failed").inc()
        answer.tell(Failed(error))


def _steps(turns: Turns) -> bool:
    """Return whether the next turn of an answer is a step that can be computed with those of others."""
    return isinstance(turns, FreeTurns) and turns.following is not None
