"""Greedy generation by graphs of fixed shapes: one reads chunks of a prompt, the other single tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glmexport.errors import InputError
from glmexport.loop import FixedLoopConfig
from glmexport.validation.fixed import FixedGraph
from glmexport.validation.session import open_session
from glmexport.validation.speculation import Speculation


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

    def start(self, prompts: Sequence[Sequence[int]]) -> FixedSequences:
        """Sequences of one length, of which nothing is computed yet; each is computed by itself."""
        return FixedSequences(self, prompts)


class FixedSequences:
    """Sequences that are generated together, each in caches of its own."""

    def __init__(self, loop: FixedLoop, prompts: Sequence[Sequence[int]]) -> None:
        self._sequences = [_Sequence(loop) for _ in prompts]
        self._new = prompts

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """The most likely token [batch] of every sequence, again and again, each added to its sequence."""
        while True:
            pairs = zip(self._sequences, self._new, strict=True)
            tokens = np.array([sequence.advance(ids) for sequence, ids in pairs], np.int64)
            self._new = tokens[:, None].tolist()
            yield tokens


class _Sequence:
    def __init__(self, loop: FixedLoop) -> None:
        self._loop = loop
        self._caches = loop.chunk.begin()
        self._length = 0

    def advance(self, ids: Sequence[int]) -> int:
        """Compute ``ids`` behind what was computed before, and return the most likely token behind them."""
        while True:
            # A prompt begins at the first position, and the caches hold whole chunks: none passes their end.
            graph = self._loop.chunk if len(ids) > 1 else self._loop.step
            logits = graph.run(self._caches, ids[: graph.positions], self._length)
            self._length += min(len(ids), graph.positions)
            ids = ids[graph.positions :]
            if not ids:
                return int(logits[-1].argmax())
