"""Speculative decoding: cheap guesses of the next tokens, all of which the model verifies in one step.

A guess is kept where it is the token that the model itself gives, so that greedy answers are those without guesses
(arXiv 2211.17192, at temperature 0). What can differ is rounding: a runtime may add numbers up in another order for
several positions than for one, as it may in a batch.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from glmexport.engine.core.drafting import Drafter
from glmexport.engine.core.sequence import Sequence
from glmexport.foundation.errors import InputError

Method = Literal["lookup", "mtp"]

#: Number of tokens guessed at a time: MTP was trained for one; a text that repeats itself does so for longer.
DEFAULT_TOKENS: dict[Method, int] = {"lookup": 8, "mtp": 1}


@dataclass
class Tally:
    """A count of guesses: tokens ``drafted`` and ``accepted``, and ``steps`` of the model after the prompt."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Speculation:
    """A way to guess, the most ``tokens`` at a time, and the tally of its guesses so far."""

    method: Method
    tokens: int
    tally: Tally = field(default_factory=Tally)


def open_speculation(method: str, tokens: int | None) -> Speculation | None:
    """Return ``method`` lookup or mtp with the usual number of ``tokens``, if none is given; None for the method none.

    Raises:
        InputError: a number of tokens for the method none.
    """
    if method == "none":
        if tokens is not None:
            raise InputError("--draft-tokens is given, and nothing is guessed.", next_step="Add --speculate lookup.")
        return None
    named: Method = "mtp" if method == "mtp" else "lookup"
    return Speculation(named, DEFAULT_TOKENS[named] if tokens is None else tokens)


def speculate(
    sequence: Sequence,
    drafter: Drafter,
    prompt: abc.Sequence[int],
    count: int,
    speculation: Speculation,
    chunk: int | None,
) -> Iterator[int]:
    """Yield ``count`` greedy tokens after ``prompt``.

    Args:
        sequence: A sequence of which nothing is computed yet, with room for the prompt and ``count`` tokens.
        drafter: The drafter that guesses.
        prompt: At least one token.
        count: At least one.
        speculation: As many tokens as a short step has positions, less one; its tally is added to.
        chunk: Positions of the prompt that are computed together; None: all of them.
    """
    size = chunk or len(prompt)
    for start in range(0, len(prompt), size):
        part = prompt[start : start + size]
        logits = sequence.advance(part)
        drafter.follow(part, sequence.hidden)
    token, left = int(logits[-1].argmax()), count
    while True:
        yield token
        left -= 1
        if left == 0:
            return
        # The step gives one token more than there are right guesses, and only those that are left are wanted.
        drafts = drafter.propose(token, min(speculation.tokens, left - 1)) if left > 1 else []
        given = sequence.advance([token, *drafts], every=True).argmax(-1).tolist()
        right = next((at for at, draft in enumerate(drafts) if draft != given[at]), len(drafts))
        hidden = sequence.hidden
        sequence.forget(len(drafts) - right)
        drafter.follow([token, *drafts[:right]], None if hidden is None else hidden[:, : right + 1])
        tally = speculation.tally
        tally.steps += 1
        tally.drafted += len(drafts)
        tally.accepted += right
        left -= right
        yield from drafts[:right]
        token = given[right]
