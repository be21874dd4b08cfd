"""Greedy generation by graphs of fixed shapes: one reads chunks of a prompt, the other single tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glmexport.bundle.loop import FixedLoopConfig
from glmexport.engine.fixed import FixedGraph
from glmexport.engine.session import open_session
from glmexport.engine.speculation import Speculation
from glmexport.foundation.errors import InputError


class FixedLoop:
    """Both graphs of a bundle in ONNX Runtime. ``config`` is its loop.json; ``profile`` begins the names of profiles.

    Raises:
        InputError: ``speculation`` is given, which takes logits of several positions.
        MachineError: this ONNX Runtime has no execution provider of that name.
        BundleError: ONNX Runtime refuses a graph.
    """

    kind = "in fixed shapes"

    def __init__(
        self,
        bundle: Path,
        config: FixedLoopConfig,
        threads: int,
        profile: Path | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        if speculation:
            raise InputError(
                f"{bundle} has graphs of fixed shapes, which give the logits of one position, and guesses are verified "
                "by those of several.",
                next_step="Leave --speculate out.",
            )

        def opened(name: str, suffix: str) -> FixedGraph:
            named = profile.with_name(f"{profile.name}-{suffix}") if profile else None
            session = open_session(bundle / name, config.provider, threads, named, config.session.config)
            return FixedGraph(session, config)

        self.context_length = config.context_length
        self.chunk, self.step = opened(config.graph, "chunk"), opened(config.step_graph, "step")

    def end_profile(self) -> list[Path]:
        """The file of each graph's profile, which is whole then."""
        return [Path(graph.session.end_profiling()) for graph in (self.chunk, self.step)]

    def distributions(self, prompt: Sequence[int], count: int) -> Iterator[NDArray[np.float32]]:
        """Logits [vocabulary] fp32 before each of ``count`` greedy tokens behind ``prompt``."""
        sequence, ids = FixedSequence(self), list(prompt)
        for _ in range(count):
            (logits,) = sequence.advance(ids)
            yield logits
            ids = [int(logits.argmax())]

    def start(self, prompts: Sequence[Sequence[int]]) -> FixedSequences:
        """Sequences of one length, of which nothing is computed yet; each is computed by itself."""
        return FixedSequences(self, prompts)


class FixedSequences:
    """Sequences that are generated together, each in caches of its own."""

    def __init__(self, loop: FixedLoop, prompts: Sequence[Sequence[int]]) -> None:
        self._sequences = [FixedSequence(loop) for _ in prompts]
        self._new = prompts

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """The most likely token [batch] of every sequence, again and again, each added to its sequence."""
        while True:
            pairs = zip(self._sequences, self._new, strict=True)
            tokens = np.array([sequence.advance(ids)[0].argmax() for sequence, ids in pairs], np.int64)
            self._new = tokens[:, None].tolist()
            yield tokens


class FixedSequence:
    """One sequence, of which ``length`` tokens are computed."""

    def __init__(self, loop: FixedLoop) -> None:
        self._loop = loop
        self._caches = loop.chunk.begin()
        self.length = 0

    def advance(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Compute ``ids`` behind what was computed before; logits [1, vocabulary] behind the last."""
        while True:
            # What fills a chunk up has to have room behind it, too.
            wide = len(ids) > 1 and self.length + self._loop.chunk.positions <= self._loop.context_length
            graph = self._loop.chunk if wide else self._loop.step
            logits = graph.run(self._caches, ids[: graph.positions], self.length)
            self.length += min(len(ids), graph.positions)
            ids = ids[graph.positions :]
            if not ids:
                return logits[-1:]

    def forget(self, count: int) -> None:
        """Take the last ``count`` tokens back: what is behind the length is written over."""
        self.length -= count
