"""Greedy generation over caches of a fixed capacity, by ONNX Runtime itself: latents, and keys of an indexer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glmexport.bundle.loop import LoopConfig
from glmexport.engine.capacity import CapacityGraph
from glmexport.engine.session import open_session
from glmexport.engine.speculation import Drafter, PromptLookup, Speculation, Step, Verified
from glmexport.engine.token_prediction import TokenPredictor
from glmexport.foundation.errors import InputError

#: Positions of a prompt that are computed together: their scores against the whole cache are held for every head.
CHUNK = 256


class LatentLoop:
    """The graph of a bundle in ONNX Runtime. ``config`` is its loop.json; ``profile`` begins the name of a profile.

    With a ``speculation`` by MTP the draft graph is loaded, too.

    Raises:
        InputError: the bundle has no graph for that speculation.
        MachineError: this ONNX Runtime has no execution provider of that name.
        BundleError: ONNX Runtime refuses a graph.
    """

    kind = "over latents"

    def __init__(
        self,
        bundle: Path,
        config: LoopConfig,
        threads: int,
        profile: Path | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        _refuse(bundle, config, speculation)
        self._config = config
        self._session = open_session(bundle / config.graph, config.provider, threads, profile, config.session.config)
        self.graph = CapacityGraph(self._session, config, config.context_length)
        self.context_length = config.context_length
        self._draft: CapacityGraph | None = None
        if speculation and speculation.method == "mtp" and config.draft:
            session = open_session(bundle / config.draft.graph, config.provider, threads, config=config.session.config)
            self._draft = CapacityGraph(session, config.draft, config.context_length)

    @property
    def cache_bytes_per_token(self) -> int:
        """Of one sequence, over all layers."""
        return 4 * sum(self.graph.widths.values())

    def end_profile(self) -> list[Path]:
        """The file of the profile, which is whole then."""
        return [Path(self._session.end_profiling())]

    def start(self, prompts: Sequence[Sequence[int]]) -> LatentSequences:
        """Sequences of one length, of which nothing is computed yet."""
        return LatentSequences(self.graph, self._config, np.array(prompts, np.int64), drafting=self._draft is not None)

    def distributions(self, prompt: Sequence[int], count: int) -> Iterator[NDArray[np.float32]]:
        """Logits [vocabulary] fp32 before each of ``count`` greedy tokens behind ``prompt``."""
        caches, ids = self.graph.begin(1), np.array([prompt], np.int64)
        for _ in range(count):
            for start in range(0, ids.shape[1], CHUNK):
                (logits,) = caches.run(ids[:, start : start + CHUNK], {}, [self._config.logits])
            yield logits[0, -1]
            ids = logits[:, -1:].argmax(-1)

    def single(self, prompt: Sequence[int], max_length: int) -> Verified:
        """One sequence of at most ``max_length`` tokens, which begins with ``prompt``; nothing of it is computed."""
        assert max_length <= self.context_length
        return self.start([prompt])

    def drafter(self) -> Drafter:
        """What guesses the tokens of a sequence, of which it knows nothing yet."""
        if self._draft and self._config.draft:
            return TokenPredictor(self._draft, self._config.draft)
        return PromptLookup()


def _refuse(bundle: Path, config: LoopConfig, speculation: Speculation | None) -> None:
    if speculation and speculation.tokens >= config.short_step:
        raise InputError(
            f"The graph of {bundle} verifies {config.short_step - 1} tokens at a time, and {speculation.tokens} are to "
            "be guessed.",
            next_step="Guess fewer, or build the bundle again with this version of glmexport.",
        )
    if speculation and speculation.method == "mtp" and not config.draft:
        raise InputError(
            f"{bundle} has no draft graph: the original has no layer that predicts further ahead.",
            next_step="Take --speculate lookup or none.",
        )


class LatentSequences:
    """Sequences that are generated together, and their caches; hidden states are read if they are for ``drafting``."""

    def __init__(self, graph: CapacityGraph, config: LoopConfig, ids: NDArray[np.int64], *, drafting: bool) -> None:
        self._caches = graph.begin(len(ids))
        self._outputs = [config.logits, *([config.hidden] if drafting and config.hidden else [])]
        self._new = ids

    @property
    def chunk(self) -> int:
        """Positions of a prompt that are computed together."""
        return CHUNK

    @property
    def cache_bytes(self) -> int:
        """What all caches take."""
        return self._caches.bytes

    @property
    def capacity(self) -> int:
        """Positions that the caches have room for."""
        return self._caches.capacity

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """The most likely token [batch] of every sequence, again and again, each added to its sequence."""
        while True:
            for start in range(0, self._new.shape[1], CHUNK):
                step = self.advance(self._new[:, start : start + CHUNK])
            tokens = step.likely[:, -1]
            self._new = tokens[:, None]
            yield tokens

    def advance(self, ids: NDArray[np.int64]) -> Step:
        """Compute ``ids`` [batch, new] behind what was computed before."""
        logits, *hidden = self._caches.run(ids, {}, self._outputs)
        return Step(logits.argmax(-1), hidden[0] if hidden else None)

    def forget(self, count: int) -> None:
        """Take the last ``count`` tokens of every sequence back."""
        self._caches.forget(count)
