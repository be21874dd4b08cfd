"""Detection of a generated text that ends in a loop: one block of tokens, over and over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: The longest block that is looked for, in tokens.
LONGEST_PERIOD = 64
#: Least number of repeats: three times is what a refrain or a list of alike lines has too.
LEAST_REPEATS = 4
#: Least length of a loop in tokens: a rule of dashes or a row of zeros is shorter.
LEAST_TOKENS = 24


@dataclass(frozen=True)
class Loop:
    """A repetition of ``repeats`` whole blocks: the tokens from ``start`` on repeat those ``period`` before them."""

    period: int
    repeats: int
    start: int


def find_loop(tokens: Sequence[int]) -> Loop | None:
    """Return the loop of the shortest period that the text ends in, wherever in its block it was cut.

    The result is None if there is none.

    Takes time in proportion to the number of tokens times ``LONGEST_PERIOD``.
    """
    text = np.asarray(tokens, np.int64)
    for period in range(1, min(LONGEST_PERIOD, len(text) // LEAST_REPEATS) + 1):
        differs = np.flatnonzero(text[period:] != text[:-period])
        start = int(differs[-1]) + 1 if len(differs) else 0
        length = len(text) - start
        if length >= max(LEAST_TOKENS, LEAST_REPEATS * period):
            return Loop(period, length // period, start)
    return None
