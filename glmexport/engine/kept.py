"""Sequences of earlier requests that new ones may go on with: the next turn of a conversation begins with the last.

Reuse changes no answer, not by a bit: runtimes add numbers up in another order for one position than for many, and so
only whole pieces of a prompt are taken over, behind which the rest is computed in the pieces that it would have anyway.
What was said before is computed again as part of the prompt.

Each key has its own: a prompt that is answered sooner than it could be would tell that somebody has sent it before.
"""

from __future__ import annotations

from collections.abc import Sequence

from glmexport.engine.computed import Computed


class Kept:
    """Some sequences, those used last behind the others. ``chunk``: positions of a piece; None: prompts have none."""

    def __init__(self, chunk: int | None) -> None:
        self._chunk = chunk
        #: With the key that each was asked with.
        self._sequences: list[tuple[int | None, Computed]] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def keep(self, sequence: Computed, key: int | None) -> None:
        """As the one used last, if it has anything to take over; otherwise it is closed."""
        if self._chunk and sequence.whole:
            self._sequences.append((key, sequence))
        else:
            sequence.close()

    def drop(self, count: int) -> None:
        """Leave at most ``count``, and close the others."""
        over = max(0, len(self._sequences) - count)
        for _, sequence in self._sequences[:over]:
            sequence.close()
        del self._sequences[:over]

    def take(self, prompt: Sequence[int], length: int, key: int | None) -> Computed | None:
        """The sequence of a ``key`` that shares most with ``prompt``, with room for ``length``, cut to what it shares.

        None where each would lose more than it saves, such as conversations that share no more than their beginning.
        At least one token of the prompt is left to compute, since only then there are logits.
        """
        best, shared = None, 0
        for sequence in (sequence for owner, sequence in self._sequences if owner == key):
            common = self._whole(min(_common(sequence.tokens[: sequence.whole], prompt), len(prompt) - 1))
            if common > shared and 2 * common >= sequence.whole and sequence.capacity >= length:
                best, shared = sequence, common
        if best is not None:
            self._sequences.remove((key, best))
            best.forget(len(best.tokens) - shared)
            best.whole = shared
        return best

    def _whole(self, count: int) -> int:
        """The tokens among ``count`` that are in whole pieces."""
        return count - count % self._chunk if self._chunk else 0


def _common(mine: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for at, (one, other) in enumerate(zip(mine, others, strict=False)):
        if one != other:
            return at
    return min(len(mine), len(others))
