"""Sequences of earlier requests that new ones may continue: the next turn of a conversation begins with the last.

Reuse changes no answer, not by a bit: runtimes add numbers up in another order for one position than for many, and so
only whole pieces of a prompt are taken over, after which the rest is computed in the pieces that it would have anyway.
Earlier answers are computed again as part of the prompt.

Each key has its own sequences: a prompt that is answered sooner than it could be would tell that it was sent before.
"""

from __future__ import annotations

from collections import abc

from glmexport.engine.core.sequence import Sequence

#: Step in tokens of the room of a sequence, which has one step more, for a conversation to continue in.
ROOM = 1024


def room_for(length: int, context_length: int) -> int:
    """Return the room, in tokens, of a sequence that needs ``length`` of them and that others may continue."""
    return min((-(-length // ROOM) + 1) * ROOM, context_length)


class Kept:
    """The sequences that are kept, those used last at the end.

    ``chunk``: positions of a piece of a prompt; None: prompts are not cut, and nothing is kept.
    """

    def __init__(self, chunk: int | None) -> None:
        self._chunk = chunk
        #: The sequences, each with the key of its request.
        self._sequences: list[tuple[int | None, Sequence]] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def keep(self, sequence: Sequence, key: int | None) -> None:
        """Keep a sequence as the one used last, if it has anything to take over; otherwise close it."""
        if self._chunk and sequence.whole:
            self._sequences.append((key, sequence))
        else:
            sequence.close()

    def drop(self, count: int) -> None:
        """Keep at most ``count`` of them, and close the others."""
        over = max(0, len(self._sequences) - count)
        for _, sequence in self._sequences[:over]:
            sequence.close()
        del self._sequences[:over]

    def take(self, prompt: abc.Sequence[int], length: int, key: int | None) -> Sequence | None:
        """Return the sequence of a ``key`` that shares most with ``prompt``, cut to what it shares.

        It has room for ``length`` tokens. None where each would lose more than it saves, such as conversations that
        share no more than their beginning. At least one token of the prompt is left to compute, since only then there
        are logits.
        """
        best, shared = None, 0
        for sequence in (sequence for owner, sequence in self._sequences if owner == key):
            common = self._whole(min(_common(sequence.tokens[: sequence.whole], prompt), len(prompt) - 1))
            if common > shared and 2 * common >= sequence.whole and sequence.capacity >= length:
                best, shared = sequence, common
        if best is not None:
            self._sequences.remove((key, best))
            best.forget(len(best.tokens) - shared)
        return best

    def _whole(self, count: int) -> int:
        """Return the tokens among ``count`` that are in whole pieces."""
        return count - count % self._chunk if self._chunk else 0


def _common(mine: abc.Sequence[int], others: abc.Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    for at, (one, other) in enumerate(zip(mine, others, strict=False)):
        if one != other:
            return at
    return min(len(mine), len(others))
