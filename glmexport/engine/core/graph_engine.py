"""The engines that are plain ONNX Runtime: one over a graph for any length, one over graphs of fixed shapes."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from glmexport.engine.core.cache import GrowingCaches, KeptCaches, SharedCaches
from glmexport.engine.core.drafting import Drafter, PromptLookup
from glmexport.engine.core.graphs import FixedGraph, MaskedGraph
from glmexport.engine.core.greedy import step_alone
from glmexport.engine.core.runtime import end_profile
from glmexport.engine.core.sequence import Sequence, TrackedSequence

#: Number of prompt positions that are computed together: their scores against the whole cache are held for every head.
CHUNK = 256
#: Number of positions that a cache of a capacity grows by.
GROWTH = 256


@dataclass(frozen=True)
class EngineLimits:
    """The tokens that end an answer, the most that a sequence can have, and the positions of a short step."""

    ends: frozenset[int]
    context_length: int
    short_step: int = 1


class GraphEngine:
    """A graph for any length, whose caches grow by whole steps, or are returned longer by the graph itself.

    ``drafter`` makes a drafter for a sequence.
    """

    batched = False
    chunk = CHUNK

    def __init__(
        self, graph: MaskedGraph, limits: EngineLimits, drafter: abc.Callable[[], Drafter] = PromptLookup
    ) -> None:
        self.graph = graph
        self.ends = limits.ends
        self.context_length = limits.context_length
        self.short_step = limits.short_step
        self.drafter = drafter
        self._grows = any(spec.grows for spec in graph.names.caches)
        loop = "over growing caches" if self._grows else "over latents"
        self.label = f"onnxruntime {onnxruntime.__version__} {loop}"

    def caches(self) -> KeptCaches:
        """Return the caches of a sequence of which nothing is computed."""
        specs = self.graph.names.caches
        return GrowingCaches(specs, 1) if self._grows else SharedCaches(specs, 1, GROWTH, self.context_length)

    def begin(self, length: int) -> GraphSequence:
        """Return a sequence of which nothing is computed, with room for a whole context."""
        return GraphSequence(self)

    def step(self, sequences: abc.Sequence[Sequence], tokens: abc.Sequence[int]) -> NDArray[np.float32]:
        """Return the logits [n, V] after one token more of each of the ``sequences``, each computed by itself."""
        return step_alone(sequences, tokens)

    def close(self) -> None:
        """Write the profile that was asked for."""
        end_profile(self.graph.session)


class GraphSequence(TrackedSequence):
    """One sequence in a graph for any length."""

    def __init__(self, engine: GraphEngine) -> None:
        super().__init__(engine.context_length, engine.chunk, engine.short_step)
        self._graph = engine.graph
        self.caches: KeptCaches | None = engine.caches()

    def _compute(self, ids: list[int], every: bool) -> NDArray[Any]:
        assert self.caches is not None
        names, length = self._graph.names, len(self.tokens) + len(ids)
        outputs = [names.recent_logits if every else names.logits, *([names.hidden] if names.hidden else [])]
        logits, *hidden = self._graph.run(np.array([ids], np.int64), [length], self.caches, outputs)
        self.hidden = hidden[0] if hidden else None
        rows: NDArray[Any] = logits[0, slice(None) if every else slice(-1, None)]
        return rows

    def _rewind(self, length: int) -> None:
        assert self.caches is not None
        self.caches.cut(length)

    def _free(self) -> None:
        self.caches = None


class FixedEngine:
    """Graphs of fixed shapes for one sequence: one reads chunks of a prompt, the other single tokens."""

    batched = False

    def __init__(self, chunk_graph: FixedGraph, step_graph: FixedGraph, limits: EngineLimits) -> None:
        self.chunk_graph = chunk_graph
        self.step_graph = step_graph
        self.chunk = chunk_graph.positions
        self.ends = limits.ends
        self.context_length = limits.context_length
        self.short_step = limits.short_step
        self.label = f"onnxruntime {onnxruntime.__version__} in fixed shapes"

    def begin(self, length: int) -> FixedSequence:
        """Return a sequence of which nothing is computed, with room for a whole context."""
        return FixedSequence(self)

    def step(self, sequences: abc.Sequence[Sequence], tokens: abc.Sequence[int]) -> NDArray[np.float32]:
        """Return the logits [n, V] after one token more of each of the ``sequences``, each computed by itself."""
        return step_alone(sequences, tokens)

    def drafter(self) -> Drafter:
        """Return a drafter that guesses by the text so far; a step of one position verifies no guess."""
        return PromptLookup()

    def close(self) -> None:
        """Write the profiles that were asked for."""
        for graph in (self.chunk_graph, self.step_graph):
            end_profile(graph.session)


class FixedSequence(TrackedSequence):
    """One sequence in graphs of fixed shapes, which give the logits of one position."""

    def __init__(self, engine: FixedEngine) -> None:
        super().__init__(engine.context_length, engine.chunk, engine.short_step)
        self._graphs = engine.chunk_graph, engine.step_graph
        self._caches: SharedCaches | None = engine.chunk_graph.begin()

    def _compute(self, ids: list[int], every: bool) -> NDArray[Any]:
        assert self._caches is not None
        chunk, step = self._graphs
        length = len(self.tokens)
        while True:
            # The padding of a chunk needs room after it, too.
            graph = chunk if len(ids) > 1 and length + chunk.positions <= self.capacity else step
            logits = graph.run(self._caches, ids[: graph.positions], length)
            length += min(len(ids), graph.positions)
            ids = ids[graph.positions :]
            if not ids:
                rows: NDArray[Any] = logits[-1:]
                return rows

    def _rewind(self, length: int) -> None:
        """Do nothing: positions after the tokens that count are written over."""

    def _free(self) -> None:
        self._caches = None
