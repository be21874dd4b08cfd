"""Cheap guesses of the next tokens, which a model verifies in one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

#: Lengths of the token sequences that are looked up, the longest first.
_NGRAMS = (4, 3, 2)


class Drafter(Protocol):
    """A drafter guesses the next tokens of one sequence."""

    def follow(self, ids: Sequence[int], hidden: NDArray[np.float32] | None) -> None:
        """Take note of tokens that the sequence goes on with, and of their hidden states [1, S, D]."""
        ...

    def propose(self, following: int, count: int) -> list[int]:
        """Return at most ``count`` tokens after ``following``, the one that comes next."""
        ...


class PromptLookup:
    """A drafter that repeats the tokens which followed the latest earlier occurrence of the last tokens."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        #: The place after the last occurrence of every sequence of ``_NGRAMS`` tokens that something followed.
        self._behind: dict[tuple[int, ...], int] = {}

    def follow(self, ids: Sequence[int], hidden: NDArray[np.float32] | None) -> None:
        """Take note of tokens; hidden states are not used."""
        for token in ids:
            self._note()
            self._tokens.append(token)

    def propose(self, following: int, count: int) -> list[int]:
        """Return at most ``count`` tokens that followed earlier in the text, repeated where it repeats itself."""
        self._note()
        text = [*self._tokens[-max(_NGRAMS) :], following]
        for size in _NGRAMS:
            start = self._behind.get(tuple(text[-size:])) if len(text) >= size else None
            if start is not None:
                # Where the text repeats itself at once, the looked-up tokens continue with those just guessed.
                found = [*self._tokens[start:], following]
                return [found[at % len(found)] for at in range(count)]
        return []

    def _note(self) -> None:
        """Note the place after the present end, where something follows."""
        for size in _NGRAMS:
            if len(self._tokens) >= size:
                self._behind[tuple(self._tokens[-size:])] = len(self._tokens)
