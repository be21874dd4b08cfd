"""A bundle in memory, and sequences in it that are computed step by step; used by one thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from glmexport.bundle.loop import LoopConfig, read_loop
from glmexport.bundle.names import RECENT_LOGITS, SHORT_STEP
from glmexport.engine.batch import BatchedSequence, BatchLoop
from glmexport.engine.capacity import CapacityGraph
from glmexport.engine.fixed_loop import FixedLoop, FixedSequence
from glmexport.engine.generation import GenaiLoop, loop_facts
from glmexport.engine.latent_loop import CHUNK, LatentLoop
from glmexport.engine.own_loop import open_loop
from glmexport.foundation.errors import InputError

#: Room of a sequence is given out in steps of so many tokens, and one more, for a conversation to go on in.
ROOM = 1024


class Computed(Protocol):
    """A sequence and its caches. ``tokens``: what is computed; ``capacity``: how many of them there can be.

    ``whole``: how many of the first tokens were computed in whole pieces of a prompt, as any other prompt that begins
    with them has them computed.
    """

    tokens: list[int]
    capacity: int
    whole: int

    def advance(self, ids: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """Compute ``ids`` behind ``tokens``; logits [1, V] behind the last, or [S, V] behind ``every`` one of a few."""
        ...

    def forget(self, count: int) -> None:
        """Take the last ``count`` tokens back."""
        ...

    def close(self) -> None:
        """Nothing follows: its memory is another's."""
        ...


class Model:
    """The bundle in ``directory``, in the loop that its caches need.

    ``batch``: sequences that are computed together, and all that there can be at a time; 0: each is computed alone.

    Raises:
        InputError: sequences of this bundle cannot be computed together.
        BundleError: the loop cannot load it.
        MachineError: this ONNX Runtime has no execution provider of the bundle's.
    """

    def __init__(self, directory: Path, threads: int, batch: int = 0) -> None:
        self.ends, self.context_length = loop_facts(directory)
        config = self._config = read_loop(directory)
        if config and batch:
            raise InputError(
                f"{directory} runs in a loop in which sequences of several lengths are not computed together.",
                next_step="Leave --batch out.",
            )
        self._loop: GenaiLoop | BatchLoop | LatentLoop | FixedLoop
        #: Positions of a prompt that are computed together; None: all of them.
        self.chunk: int | None
        #: Most tokens of a step of which the logits of each are given.
        self.short_step = config.short_step if isinstance(config, LoopConfig) else 1
        if config is None:
            self._loop = (
                BatchLoop(directory, threads, batch, self.context_length) if batch else GenaiLoop(directory, threads)
            )
            self.chunk, self.short_step = self._loop.chunk, SHORT_STEP
        else:
            self._loop = open_loop(directory, config, threads)
            self.chunk = self._loop.chunk.positions if isinstance(self._loop, FixedLoop) else CHUNK

    @property
    def together(self) -> bool:
        """Whether several sequences are computed in one step."""
        return isinstance(self._loop, BatchLoop)

    def step(self, sequences: Sequence[Computed], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n, V] behind a token more of each of the sequences, computed together."""
        assert isinstance(self._loop, BatchLoop)
        return self._loop.step(cast(Sequence[BatchedSequence], sequences), tokens)

    def begin(self, length: int) -> Computed:
        """A sequence of which nothing is computed, with room for at least ``length`` tokens."""
        if isinstance(self._loop, FixedLoop):
            return FixedShapeSequence(self._loop)
        if isinstance(self._loop, LatentLoop):
            assert isinstance(self._config, LoopConfig)
            return LatentSequence(self._loop.graph, self._config, self.context_length)
        if isinstance(self._loop, BatchLoop):
            return self._loop.begin()
        capacity = min((-(-length // ROOM) + 1) * ROOM, self.context_length)
        return GenaiSequence(self._loop.generator(1, capacity), capacity)


class GenaiSequence:
    """One sequence in onnxruntime-genai."""

    def __init__(self, generator: Any, capacity: int) -> None:
        self._generator = generator
        self.capacity = capacity
        self.tokens: list[int] = []
        self.whole = 0

    def advance(self, ids: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """As ``Computed``."""
        self._generator.append_tokens(np.array(ids, np.int32))
        logits = self._generator.get_output(RECENT_LOGITS) if every else self._generator.get_logits()
        self.tokens += ids
        rows: NDArray[np.float32] = logits.reshape(-1, logits.shape[-1]).astype(np.float32, copy=False)
        return rows

    def forget(self, count: int) -> None:
        """As ``Computed``."""
        if count:
            del self.tokens[-count:]
            self._generator.rewind_to(len(self.tokens))

    def close(self) -> None:
        """As ``Computed``; what nobody refers to is freed."""


class LatentSequence:
    """One sequence over latents; its caches grow as it does."""

    def __init__(self, graph: CapacityGraph, config: LoopConfig, capacity: int) -> None:
        self._caches = graph.begin(1)
        self._logits = config.logits
        self.capacity = capacity
        self.tokens: list[int] = []
        self.whole = 0

    def advance(self, ids: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """As ``Computed``."""
        (logits,) = self._caches.run(np.array([ids], np.int64), {}, [self._logits])
        self.tokens += ids
        return logits[0, slice(None) if every else slice(-1, None)].astype(np.float32, copy=False)

    def forget(self, count: int) -> None:
        """As ``Computed``."""
        if count:
            del self.tokens[-count:]
            self._caches.forget(count)

    def close(self) -> None:
        """As ``Computed``; what nobody refers to is freed."""


class FixedShapeSequence:
    """One sequence in graphs of fixed shapes, which give the logits of one position."""

    def __init__(self, loop: FixedLoop) -> None:
        self._sequence = FixedSequence(loop)
        self.capacity = loop.context_length
        self.tokens: list[int] = []
        self.whole = 0

    def advance(self, ids: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """As ``Computed``."""
        assert not every or len(ids) == 1
        logits = self._sequence.advance(list(ids))
        self.tokens += ids
        return logits.astype(np.float32, copy=False)

    def forget(self, count: int) -> None:
        """As ``Computed``."""
        if count:
            del self.tokens[-count:]
            self._sequence.forget(count)

    def close(self) -> None:
        """As ``Computed``; what nobody refers to is freed."""
