"""Speculative decoding: cheap guesses of the next tokens, all of which the model verifies in one step.

A guess is kept where it is the token that the model itself gives, so that greedy answers are those without guesses
(arXiv 2211.17192, at temperature 0). What can differ is rounding: a runtime may add numbers up in another order for
several positions than for one, as it may in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from glmexport.foundation.errors import InputError

Method = Literal["lookup", "mtp"]

#: Tokens guessed at a time: MTP was trained for one; a text that repeats itself does so for longer.
DEFAULT_TOKENS: dict[Method, int] = {"lookup": 8, "mtp": 1}
#: Lengths of the token sequences that are looked up, the longest that is found first.
_NGRAMS = (4, 3, 2)


@dataclass
class Tally:
    """What became of the guesses: tokens ``drafted`` and ``accepted``, and ``steps`` of the model behind the prompt."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Speculation:
    """How to guess, how many ``tokens`` at a time at most, and what became of it so far."""

    method: Method
    tokens: int
    tally: Tally = field(default_factory=Tally)


def open_speculation(method: str, tokens: int | None) -> Speculation | None:
    """``method`` lookup or mtp with the usual number of ``tokens``, if none is given; None for the method none.

    Raises:
        InputError: a number of tokens for the method none.
    """
    if method == "none":
        if tokens is not None:
            raise InputError("--draft-tokens is given, and nothing is guessed.", next_step="Add --speculate lookup.")
        return None
    named: Method = "mtp" if method == "mtp" else "lookup"
    return Speculation(named, DEFAULT_TOKENS[named] if tokens is None else tokens)


@dataclass(frozen=True)
class Step:
    """What a model computed of new tokens.

    ``likely`` [B, R]: the most likely token behind each of them, or behind the last one only, if they were many.
    ``hidden`` [B, S, D]: their hidden states behind the final norm, if they were asked for.
    """

    likely: NDArray[np.int64]
    hidden: NDArray[np.float32] | None = None


class Verified(Protocol):
    """One sequence in a loop that can take tokens back."""

    @property
    def chunk(self) -> int:
        """Positions of a prompt that are computed together."""
        ...

    def advance(self, ids: NDArray[np.int64]) -> Step:
        """Compute ``ids`` [1, S], which follow on what was computed before."""
        ...

    def forget(self, count: int) -> None:
        """Take the last ``count`` tokens back."""
        ...


class Drafter(Protocol):
    """What guesses."""

    def follow(self, ids: Sequence[int], hidden: NDArray[np.float32] | None) -> None:
        """Take note of tokens that the sequence goes on with, and of their hidden states [1, S, D]."""
        ...

    def propose(self, following: int, count: int) -> list[int]:
        """At most ``count`` tokens behind ``following``, the one that comes next."""
        ...


def speculate(
    sequence: Verified, drafter: Drafter, prompt: Sequence[int], count: int, speculation: Speculation
) -> Iterator[int]:
    """``count`` greedy tokens behind ``prompt``.

    Args:
        sequence: nothing of it is computed yet.
        drafter: guesses.
        prompt: at least one token.
        count: what the context has room for.
        speculation: as many tokens as a short step has positions, less one; its tally is added to.
    """
    ids = np.array([prompt], np.int64)
    for start in range(0, len(prompt), sequence.chunk):
        part = ids[:, start : start + sequence.chunk]
        step = sequence.advance(part)
        drafter.follow(part[0].tolist(), step.hidden)
    token, left = int(step.likely[0, -1]), count
    while True:
        yield token
        left -= 1
        if left == 0:
            return
        # The step gives one token more than there are right guesses, and no more than are left are wanted.
        drafts = drafter.propose(token, min(speculation.tokens, left - 1)) if left > 1 else []
        step = sequence.advance(np.array([[token, *drafts]], np.int64))
        given = step.likely[0].tolist()
        right = next((at for at, draft in enumerate(drafts) if draft != given[at]), len(drafts))
        sequence.forget(len(drafts) - right)
        drafter.follow([token, *drafts[:right]], None if step.hidden is None else step.hidden[:, : right + 1])
        tally = speculation.tally
        tally.steps += 1
        tally.drafted += len(drafts)
        tally.accepted += right
        left -= right
        yield from drafts[:right]
        token = given[right]


class PromptLookup:
    """Guesses that what followed the last tokens the last time that they occurred will follow again."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        #: Place behind the last occurrence of every sequence of ``_NGRAMS`` tokens that something followed on.
        self._behind: dict[tuple[int, ...], int] = {}

    def follow(self, ids: Sequence[int], hidden: NDArray[np.float32] | None) -> None:
        """As ``Drafter``; hidden states are not looked at."""
        for token in ids:
            self._note()
            self._tokens.append(token)

    def propose(self, following: int, count: int) -> list[int]:
        """As ``Drafter``."""
        self._note()
        text = [*self._tokens[-max(_NGRAMS) :], following]
        for size in _NGRAMS:
            start = self._behind.get(tuple(text[-size:])) if len(text) >= size else None
            if start is not None:
                # Where the text repeats itself at once, what is looked up goes on with what was just guessed.
                found = [*self._tokens[start:], following]
                return [found[at % len(found)] for at in range(count)]
        return []

    def _note(self) -> None:
        """The place behind the present end, which something follows on."""
        for size in _NGRAMS:
            if len(self._tokens) >= size:
                self._behind[tuple(self._tokens[-size:])] = len(self._tokens)
