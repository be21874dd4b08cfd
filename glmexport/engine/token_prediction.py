"""Guesses by the layer that predicts further ahead, in a graph of its own beside the model's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from glmexport.bundle.loop import DraftConfig
from glmexport.engine.capacity import CapacityGraph


class TokenPredictor:
    """The draft graph of one sequence.

    Position i of its caches is the pair of hidden state h_i and token t_(i+1), so that it is one token behind the
    model: the last hidden state waits until the token is known that it leads to.
    """

    def __init__(self, graph: CapacityGraph, config: DraftConfig) -> None:
        self._caches = graph.begin(1)
        self._config = config
        self._ids: list[int] = []
        self._hidden: NDArray[np.float32] | None = None

    def follow(self, ids: Sequence[int], hidden: NDArray[np.float32] | None) -> None:
        """As ``Drafter``."""
        assert hidden is not None
        if self._hidden is not None:
            self._read(ids[0])
        self._ids, self._hidden = list(ids[1:]), hidden

    def propose(self, following: int, count: int) -> list[int]:
        """As ``Drafter``; guesses behind the first rest on guesses, also of hidden states."""
        token, hidden = self._read(following)
        drafts = [token]
        while len(drafts) < count:
            token, hidden = self._run([token], hidden)
            drafts.append(token)
        self._caches.forget(count - 1)
        return drafts

    def _read(self, following: int) -> tuple[int, NDArray[np.float32]]:
        """What waits, now that the token is known that it leads to."""
        assert self._hidden is not None
        ids, hidden = [*self._ids, following], self._hidden
        self._hidden = None
        return self._run(ids, hidden)

    def _run(self, ids: Sequence[int], hidden: NDArray[np.float32]) -> tuple[int, NDArray[np.float32]]:
        """The most likely token behind the last pair, and its hidden state [1, 1, D]."""
        outputs = [self._config.logits, self._config.hidden]
        logits, last = self._caches.run(np.array([ids], np.int64), {self._config.past_hidden: hidden}, outputs)
        return int(logits[0, -1].argmax()), last
