"""The drafter by the layer that predicts further ahead, in a graph of its own beside the model's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from glmexport.engine.core.cache import SharedCaches
from glmexport.engine.core.graph_engine import GROWTH
from glmexport.engine.core.graphs import MaskedGraph


class TokenPredictor:
    """A drafter that guesses by a bundle's draft graph for one sequence of up to ``context_length`` tokens.

    Position i of its caches is the pair of hidden state h_i and token t_(i+1), so that it lags one token behind the
    model: the last hidden state waits until the token is known that it leads to. ``past_hidden`` names the input of the
    hidden states.
    """

    def __init__(self, graph: MaskedGraph, past_hidden: str, context_length: int) -> None:
        self._graph = graph
        self._past_hidden = past_hidden
        self._caches = SharedCaches(graph.names.caches, 1, GROWTH, context_length)
        self._length = 0
        self._ids: list[int] = []
        self._hidden: NDArray[np.float32] | None = None

    def follow(self, ids: Sequence[int], hidden: NDArray[np.float32] | None) -> None:
        """Take note of tokens that the sequence goes on with, and of their ``hidden`` states [1, S, D]."""
        assert hidden is not None
        if self._hidden is not None:
            self._read(ids[0])
        self._ids, self._hidden = list(ids[1:]), hidden

    def propose(self, following: int, count: int) -> list[int]:
        """Return ``count`` tokens after ``following``; after the first, hidden states are guesses, too."""
        token, hidden = self._read(following)
        drafts = [token]
        while len(drafts) < count:
            token, hidden = self._run([token], hidden)
            drafts.append(token)
        # Positions after the length are written over.
        self._length -= count - 1
        return drafts

    def _read(self, following: int) -> tuple[int, NDArray[np.float32]]:
        """Compute the pairs that wait, now that the token is known that the last of them leads to."""
        assert self._hidden is not None
        ids, hidden = [*self._ids, following], self._hidden
        self._hidden = None
        return self._run(ids, hidden)

    def _run(self, ids: Sequence[int], hidden: NDArray[np.float32]) -> tuple[int, NDArray[np.float32]]:
        """Return the most likely token after the last pair, and its hidden state [1, 1, D]."""
        names = self._graph.names
        assert names.hidden is not None
        self._length += len(ids)
        logits, last = self._graph.run(
            np.array([ids], np.int64),
            [self._length],
            self._caches,
            [names.logits, names.hidden],
            {self._past_hidden: hidden},
        )
        return int(logits[0, -1].argmax()), last
