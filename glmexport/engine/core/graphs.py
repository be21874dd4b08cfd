"""The graphs of a bundle in ONNX Runtime: for any number of positions and sequences, and of fixed shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from glmexport.engine.core.cache import Caches, CacheSpec, SharedCaches, UnkeptCaches, run_graph


@dataclass(frozen=True)
class GraphNames:
    """The names of a graph's inputs and outputs, and its caches.

    ``recent_logits`` are those of every position of a short step, where ``logits`` may be of the last alone.
    """

    input_ids: str
    attention_mask: str
    logits: str
    caches: tuple[CacheSpec, ...]
    recent_logits: str
    #: The hidden states [B, S, D] after the final norm, if they are wanted.
    hidden: str | None = None


class MaskedGraph:
    """A graph for any number of positions and of sequences; a mask gives the length of each sequence."""

    def __init__(self, session: onnxruntime.InferenceSession, names: GraphNames) -> None:
        self.session = session
        self.names = names

    def run(
        self,
        ids: NDArray[np.int64],
        lengths: Sequence[int],
        caches: Caches,
        outputs: Sequence[str],
        inputs: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> list[NDArray[Any]]:
        """Compute ``ids`` [B, S] of sequences that are ``lengths`` [B] long with them, and return ``outputs``.

        ``inputs`` are the graph's inputs beside ids, mask and caches.
        """
        longest = max(lengths)
        caches.reserve(longest)
        mask = np.ones((len(lengths), longest), np.int64)
        for row, length in enumerate(lengths):
            mask[row, length:] = 0
        given: dict[str, NDArray[Any]] = {self.names.input_ids: ids, self.names.attention_mask: mask}
        given.update(inputs or {})
        return run_graph(self.session, given, outputs, caches)

    def scores(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return the logits [length, V] after each of ``ids`` [length], from empty caches; the graph gives all."""
        caches = UnkeptCaches(self.names.caches, 1)
        (logits,) = self.run(ids[None], [len(ids)], caches, [self.names.logits])
        rows: NDArray[Any] = logits[0]
        return rows


@dataclass(frozen=True)
class FixedNames:
    """The names of the inputs and outputs of a graph of fixed shapes, its caches, and the positions that these hold.

    ``asked_position`` is the index [1] of the position whose logits the graph gives, if it gives those of one alone.
    """

    input_ids: str
    position_ids: str
    asked_position: str
    logits: str
    caches: tuple[CacheSpec, ...]
    context_length: int


class FixedGraph:
    """A graph of fixed shapes: one sequence, and in each run as many new ``positions``."""

    def __init__(self, session: onnxruntime.InferenceSession, names: FixedNames) -> None:
        self.session = session
        self.names = names
        inputs = {value.name: value.shape for value in session.get_inputs()}
        self.positions = int(inputs[names.input_ids][1])
        self._asks = names.asked_position in inputs

    def begin(self) -> SharedCaches:
        """Return caches of a sequence of which nothing is computed; every graph of a bundle takes the same."""
        length = self.names.context_length
        caches = SharedCaches(self.names.caches, 1, length, length)
        caches.reserve(length)
        return caches

    def run(self, caches: Caches, ids: Sequence[int] | NDArray[np.int64], start: int) -> NDArray[Any]:
        """Compute ``ids`` [n], n at most ``positions``, from position ``start`` on.

        The padding after them is written into the caches after the sequence, where nothing reads it before it is
        written over.

        Returns:
            Logits [n, V] of all, or [1, V] of the last one, as the graph gives them.
        """
        names, count = self.names, len(ids)
        filled = np.zeros((1, self.positions), np.int64)
        filled[0, :count] = ids
        places = np.arange(start, start + self.positions, dtype=np.int64)[None]
        inputs = {names.input_ids: filled, names.position_ids: places}
        if self._asks:
            inputs[names.asked_position] = np.array([count - 1], np.int64)
        (logits,) = run_graph(self.session, inputs, [names.logits], caches)
        rows: NDArray[Any] = logits[0, :count]
        return rows

    def scores(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return the logits [length, V] after each of ``ids`` [length], chunk by chunk; the graph gives all."""
        caches, starts = self.begin(), range(0, len(ids), self.positions)
        return np.concatenate([self.run(caches, ids[start : start + self.positions], start) for start in starts])
