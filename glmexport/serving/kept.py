"""Sequences of earlier requests that new ones may go on with: the next turn of a conversation begins with the last."""

from __future__ import annotations

from collections.abc import Sequence

from glmexport.serving.model import Computed

#: A shorter common beginning is computed faster than it is worth losing what follows it.
WORTHWHILE = 64


class Kept:
    """At most so many sequences, those used last."""

    def __init__(self) -> None:
        self._sequences: list[Computed] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def keep(self, sequence: Computed) -> None:
        """As the one used last."""
        if len(sequence.tokens) >= WORTHWHILE:
            self._sequences.append(sequence)

    def drop(self, count: int) -> None:
        """Leave at most ``count``."""
        del self._sequences[: max(0, len(self._sequences) - count)]

    def take(self, prompt: Sequence[int], length: int) -> Computed | None:
        """The sequence that shares most with ``prompt`` and has room for ``length``, cut to what it shares.

        None where each would lose more than it saves, such as conversations that share no more than their beginning.
        At least one token of the prompt is left to compute, since only then there are logits.
        """
        best, shared = None, WORTHWHILE - 1
        for sequence in self._sequences:
            common = min(_common(sequence.tokens, prompt), len(prompt) - 1)
            lost = len(sequence.tokens) - common
            if common > shared and common >= lost and sequence.capacity >= length:
                best, shared = sequence, common
        if best is not None:
            self._sequences.remove(best)
            best.forget(len(best.tokens) - shared)
        return best


def _common(mine: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for at, (one, other) in enumerate(zip(mine, others, strict=False)):
        if one != other:
            return at
    return min(len(mine), len(others))
