"""One request on its way through the model: first its prompt piece by piece, then its answer token by token."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from glmexport.engine.core.drafting import PromptLookup
from glmexport.engine.core.sequence import Sequence
from glmexport.engine.sampling import Sampling, Uniforms, choose, likelihood
from glmexport.serving.guides import Guide, Held
from glmexport.serving.text import AnswerText, TextPart, Token

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Order:
    """A request to the model.

    ``top``: the number of most likely tokens to tell at each place; None: no likelihoods at all.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    #: The token ids that end the answer.
    ends: frozenset[int] = frozenset()
    top: int | None = None
    #: Whether the end token is told too.
    tells_end: bool = False
    guide: Guide | None = None
    #: The number of the key of the request; None: none. A sequence of one key is not continued for another: the answer
    #: would be quicker, and so would tell what the other had been asked.
    key: int | None = None


@dataclass
class Timing:
    """The moments of a request by the monotonic clock; 0: not yet."""

    submitted: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0

    @property
    def queue_s(self) -> float:
        """The seconds until the request was begun."""
        return max(0.0, self.begun - self.submitted)

    @property
    def ttft_s(self) -> float | None:
        """The seconds from the arrival of the request to the first token; None without one."""
        return self.first - self.submitted if self.tokens else None

    @property
    def tpot_s(self) -> float | None:
        """The mean seconds between two tokens; None with fewer."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None

    def token(self) -> float | None:
        """Take note of a token, and return the seconds since the one before."""
        now, before = time.monotonic(), self.last
        self.last = now
        self.tokens += 1
        if self.tokens == 1:
            self.first = now
            return None
        return now - before


@dataclass(frozen=True)
class End:
    """The end of an answer: its reason, and the numbers of tokens of the prompt and the answer.

    ``cached``: number of prompt tokens that were computed for an earlier request. ``stopped``: whether a stop string
    ended it, and not the model.
    """

    reason: Reason
    timing: Timing
    prompt_tokens: int
    tokens: int
    cached: int
    stopped: bool = False


@dataclass(frozen=True)
class Failed:
    """The end of an answer that cannot go on, for the ``error``."""

    error: Exception


Event = TextPart | End | Failed


class PendingAnswer:
    """An ``order`` being answered; ``listener`` is told parts and the end, ``gap`` the seconds between two tokens."""

    def __init__(
        self, order: Order, text: AnswerText, listener: Callable[[Event], None], gap: Callable[[float], None]
    ) -> None:
        self.order = order
        self.timing = Timing()
        #: Whether nobody waits for the rest; another thread sets it.
        self.cancelled = False
        self.cached = 0
        self.tokens: list[int] = []
        self._text = text
        self._listener = listener
        self._gap = gap

    def tell(self, event: Event) -> None:
        """Tell the listener; one that is no longer there has cancelled."""
        try:
            self._listener(event)
        except RuntimeError:
            self.cancelled = True

    def say(self, token: int, logits: NDArray[np.float32]) -> Reason | None:
        """Continue with a ``token`` chosen by ``logits`` [V], and return the reason of the end, if the answer ended."""
        if (since := self.timing.token()) is not None:
            self._gap(since)
        top = self.order.top
        told = Token(token, None if top is None else likelihood(logits, token, top))
        if token in self.order.ends:
            if self.order.tells_end:
                self._hand_on(self._text.add(told))
            return self.finish("stop")
        self.tokens.append(token)
        self._hand_on(self._text.add(told))
        if self._text.stopped:
            return self.finish("stop")
        if len(self.tokens) >= self.order.max_tokens:
            return self.finish("length")
        return None

    def end(self, reason: Reason) -> None:
        """Tell the listener how the answer ended."""
        self.tell(End(reason, self.timing, len(self.order.prompt), len(self.tokens), self.cached, self._text.stopped))

    def finish(self, reason: Reason) -> Reason:
        """Hand on the text that was held back, since nothing follows, and return the ``reason``."""
        self._hand_on(self._text.finish())
        return reason

    def _hand_on(self, part: TextPart) -> None:
        if part.text or part.tokens:
            self.tell(part)


class Turns(Protocol):
    """The work of an answer in turns, so that others have theirs in between."""

    answer: PendingAnswer

    def turn(self) -> Reason | None:
        """Compute one piece of the prompt or one step, and return how the answer ended, if it did."""
        ...

    def close(self) -> None:
        """Free the memory of the answer; nothing follows."""
        ...


class FreeTurns:
    """An answer whose tokens are chosen here. The tokens of ``sequence``, which begin its prompt, are computed already.

    ``guesses``: tokens guessed at a time by what followed earlier in the text. A guess is right if it would be
    chosen at its place anyway, so that guessing changes no answer but for rounding.
    """

    def __init__(self, answer: PendingAnswer, sequence: Sequence, chunk: int | None, guesses: int = 0) -> None:
        self.answer = answer
        self.sequence = sequence
        self.drafted = self.accepted = 0
        prompt = list(answer.order.prompt)
        answer.cached = len(sequence.tokens)
        self._left = prompt[answer.cached :]
        self._chunk = chunk or len(prompt)
        self._uniforms = Uniforms(answer.order.sampling.seed)
        self._guesses = guesses
        self._drafter = PromptLookup()
        #: The token that was chosen last and is not computed yet.
        self._said: int | None = None
        if guesses:
            self._drafter.follow(prompt, None)

    def turn(self) -> Reason | None:
        """Compute one piece of the prompt, or one step and the guesses after it."""
        if self._said is None:
            piece, self._left = self._left[: self._chunk], self._left[self._chunk :]
            logits = self.sequence.advance(piece)
            return None if self._left else self._say(logits, [])
        drafts = self._drafts(self._said)
        logits = self.sequence.advance([self._said, *drafts], every=bool(drafts))
        if self._guesses:
            self._drafter.follow([self._said], None)
        return self._say(logits, drafts)

    @property
    def following(self) -> int | None:
        """The token of the next step, if that is computed without guesses; otherwise None."""
        return None if self._guesses else self._said

    def take(self, logits: NDArray[np.float32]) -> Reason | None:
        """Take a turn as ``turn`` does, by the logits [V] after ``following``, computed with those of other answers."""
        return self._say(logits[None], [])

    def close(self) -> None:
        """Free the sequence."""
        self.sequence.close()

    def _drafts(self, following: int) -> list[int]:
        """Return guesses of the tokens after ``following``, as many as there is room for."""
        left = self.answer.order.max_tokens - len(self.answer.tokens)
        room = min(self._guesses, left - 1, self.sequence.capacity - len(self.sequence.tokens) - 1)
        return self._drafter.propose(following, room) if room > 0 else []

    def _say(self, logits: NDArray[np.float32], drafts: abc.Sequence[int]) -> Reason | None:
        """Say the token after those that were computed, and one more after every draft that is right."""
        reason, right = None, 0
        for row in logits:
            self._said = choose(row, self.answer.order.sampling, self._uniforms.next())
            reason = self.answer.say(self._said, row)
            if reason or right == len(drafts) or self._said != drafts[right]:
                break
            right += 1
        self.sequence.forget(len(drafts) - right)
        if self._guesses:
            self._drafter.follow(drafts[:right], None)
        self.drafted += len(drafts)
        self.accepted += right
        return reason


class GuidedTurns:
    """An answer whose tokens a grammar's process chooses among those that the grammar allows."""

    def __init__(self, answer: PendingAnswer, sequence: Sequence, held: Held, chunk: int | None) -> None:
        self.answer = answer
        self._sequence = sequence
        self._held = held
        self._left = list(answer.order.prompt)
        self._chunk = chunk or len(self._left)
        self._logits: NDArray[np.float32]

    def turn(self) -> Reason | None:
        """Compute one piece of the prompt or one step; a turn in which the process has not chosen yet is short."""
        if self._left:
            piece, self._left = self._left[: self._chunk], self._left[self._chunk :]
            self._logits = self._sequence.advance(piece)[-1]
            return None
        chosen = self._held.choose(self._logits)
        if chosen is None:
            return None
        if chosen.token is None:
            return self.answer.finish("stop")
        reason = self.answer.say(chosen.token, self._logits)
        if reason:
            return reason
        if chosen.done:
            return self.answer.finish("stop")
        self._logits = self._sequence.advance([chosen.token])[-1]
        return None

    def close(self) -> None:
        """Free the sequence and its grammar."""
        self._held.close()
        self._sequence.close()
