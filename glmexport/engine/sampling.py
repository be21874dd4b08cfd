"""The choice of a token: a pure function of the logits, the settings and one number of the request's own sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Number of most likely tokens that are sorted first; where they do not have the mass that is asked for, all are.
_FIRST = 1024


@dataclass(frozen=True)
class Sampling:
    """The settings of a choice. ``temperature`` 0 takes the most likely token; ``seed`` makes the others repeatable."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0


class Uniforms:
    """Random numbers in [0, 1): one for each token of an answer, the same whatever else the server does."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(seed))

    def next(self) -> float:
        """Return the number of the next token."""
        return float(self._generator.random())


def choose(logits: NDArray[np.float32], sampling: Sampling, uniform: float) -> int:
    """Return a token by its ``logits`` [V]: where the cumulative distribution passes ``uniform``, or the likeliest."""
    if sampling.greedy:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    if sampling.top_p < 1:
        tokens = nucleus(weights, sampling.top_p)
        weights = weights[tokens]
    else:
        tokens = np.arange(len(weights))
    cumulative = weights.cumsum()
    at = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(tokens[min(at, len(tokens) - 1)])


def nucleus(probabilities: NDArray[np.float64], mass: float) -> NDArray[np.int64]:
    """Return the fewest tokens that have at least that ``mass``, most likely first, lower ids before higher."""
    count = min(_FIRST, len(probabilities))
    while True:
        if count < len(probabilities):
            # Tokens as likely as the last of them are included, so that ids decide and not the partition.
            least = np.partition(probabilities, -count)[-count]
            candidates = np.flatnonzero(probabilities >= least)
        else:
            candidates = np.arange(len(probabilities))
        ordered = candidates[np.argsort(-probabilities[candidates], kind="stable")]
        cumulative = probabilities[ordered].cumsum()
        if cumulative[-1] >= mass or count == len(probabilities):
            return ordered[: int(np.searchsorted(cumulative, mass, side="left")) + 1]
        count = len(probabilities)


@dataclass(frozen=True)
class Likely:
    """The natural logarithms of the probabilities at temperature 1: of the token taken, and of the most likely ones."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def likelihood(logits: NDArray[np.float32], token: int, count: int) -> Likely:
    """Return how likely ``token`` is, and the ``count`` most likely ones; of equal ones the lower id is first."""
    wide = logits.astype(np.float64)
    highest = wide.max()
    total = highest + float(np.log(np.exp(wide - highest).sum()))
    top: list[tuple[int, float]] = []
    if count:
        least = np.partition(wide, -count)[-count] if count < len(wide) else -np.inf
        candidates = np.flatnonzero(wide >= least)
        ordered = candidates[np.argsort(-wide[candidates], kind="stable")][:count]
        top = [(int(index), float(wide[index] - total)) for index in ordered]
    return Likely(float(wide[token] - total), tuple(top))
