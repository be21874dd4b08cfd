"""The engine of many answers in one step: caches of several sequences side by side, next tokens computed together.

A processor reads the weights once for all of them, so that a step of eight costs little more than one of two. It adds
numbers up in another order than for one alone: an answer then depends, by rounding, on the other requests.
"""

from __future__ import annotations

from collections import abc
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from glmexport.bundle.genai_config import PREFILL_TOKENS
from glmexport.bundle.names import SHORT_STEP
from glmexport.engine.core.cache import SharedCaches
from glmexport.engine.core.drafting import Drafter, PromptLookup
from glmexport.engine.core.graph_engine import EngineLimits
from glmexport.engine.core.graphs import MaskedGraph
from glmexport.engine.core.runtime import end_profile
from glmexport.engine.core.sequence import Sequence, TrackedSequence

#: Number of positions that all caches grow by.
_GROWTH = 1024


class BatchedEngine:
    """A graph for any length, with caches of ``slots`` sequences, the most that there can be at a time."""

    batched = True
    chunk = PREFILL_TOKENS
    short_step = SHORT_STEP

    def __init__(self, graph: MaskedGraph, limits: EngineLimits, slots: int) -> None:
        self.graph = graph
        self.ends = limits.ends
        self.context_length = limits.context_length
        self.label = f"onnxruntime {onnxruntime.__version__} in batches"
        self._slots: list[BatchedSequence | None] = [None] * slots
        self._caches = SharedCaches(graph.names.caches, slots, _GROWTH, limits.context_length)

    def begin(self, length: int) -> BatchedSequence:
        """Return a sequence of which nothing is computed, in a slot that is free.

        Raises:
            ValueError: no slot is free.
        """
        slot = self._slots.index(None)
        sequence = self._slots[slot] = BatchedSequence(self, slot)
        return sequence

    def free(self, slot: int) -> None:
        """Let another sequence have the slot."""
        self._slots[slot] = None

    def step(self, sequences: abc.Sequence[Sequence], tokens: abc.Sequence[int]) -> NDArray[np.float32]:
        """Return the logits [n, V] after one token more of each of the ``sequences``, computed in one run."""
        chosen = [held for sequence in sequences for held in self._slots if held is sequence]
        first, last = (pick(sequence.slot for sequence in chosen) for pick in (min, max))
        ids = np.zeros((last - first + 1, 1), np.int64)
        for sequence, token in zip(chosen, tokens, strict=True):
            ids[sequence.slot - first] = token
        # Slots in between compute too: their new positions come after the ones that count.
        lengths = [1 + (len(other.tokens) if other else 0) for other in self._slots[first : last + 1]]
        logits = self.run(first, ids, lengths, self.graph.names.logits)
        for sequence, token in zip(chosen, tokens, strict=True):
            sequence.tokens.append(token)
        rows: NDArray[np.float32] = logits[[sequence.slot - first for sequence in chosen], -1]
        return rows

    def run(self, first: int, ids: NDArray[np.int64], lengths: abc.Sequence[int], output: str) -> NDArray[np.float32]:
        """Compute ``ids`` [n, S] of the slots from ``first`` on, which are ``lengths`` long with them."""
        self._caches.reserve(max(lengths))
        (logits,) = self.graph.run(ids, lengths, self._caches.rows(first, len(ids)), [output])
        rows: NDArray[np.float32] = logits.astype(np.float32, copy=False)
        return rows

    def drafter(self) -> Drafter:
        """Return a drafter that guesses by the text so far."""
        return PromptLookup()

    def close(self) -> None:
        """Write the profile that was asked for."""
        end_profile(self.graph.session)


class BatchedSequence(TrackedSequence):
    """One of the sequences, in its own ``slot``; a step by itself computes it alone."""

    def __init__(self, engine: BatchedEngine, slot: int) -> None:
        super().__init__(engine.context_length, engine.chunk, engine.short_step)
        self._engine = engine
        self.slot = slot

    def _compute(self, ids: list[int], every: bool) -> NDArray[Any]:
        names = self._engine.graph.names
        output = names.recent_logits if every else names.logits
        logits = self._engine.run(self.slot, np.array([ids], np.int64), [len(self.tokens) + len(ids)], output)
        rows: NDArray[Any] = logits[0]
        return rows

    def _rewind(self, length: int) -> None:
        """Do nothing: positions after the tokens that count are written over."""

    def _free(self) -> None:
        self._engine.free(self.slot)
