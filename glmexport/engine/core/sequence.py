"""What an engine is, and what a sequence in it can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import abc
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from glmexport.engine.core.drafting import Drafter


class Sequence(Protocol):
    """One sequence of tokens and its caches, used by one thread."""

    @property
    def tokens(self) -> list[int]:
        """The tokens that are computed."""
        ...

    @property
    def capacity(self) -> int:
        """The most tokens that the sequence can have."""
        ...

    @property
    def whole(self) -> int:
        """How many of the first tokens were computed in whole pieces of a prompt, as every prompt has them computed."""
        ...

    @property
    def hidden(self) -> NDArray[np.float32] | None:
        """Hidden states [1, S, D] behind the final norm of the last step, if the engine drafts with them."""
        ...

    def advance(self, ids: abc.Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """Compute ``ids`` behind ``tokens``.

        Returns:
            Logits [1, V] fp32 behind the last of them, or [S, V] behind ``every`` one of a short step.

        Raises:
            ValueError: there are no ids, more than there is room for, or more than a short step has; or it is closed.
        """
        ...

    def forget(self, count: int) -> None:
        """Take the last ``count`` tokens back.

        Raises:
            ValueError: there are fewer.
        """
        ...

    def close(self) -> None:
        """Free its memory; nothing can follow."""
        ...


class Engine(Protocol):
    """A bundle in memory in the loop that its caches need, used by one thread."""

    @property
    def label(self) -> str:
        """The runtime, its version, and the kind of loop."""
        ...

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ...

    @property
    def context_length(self) -> int:
        """The most tokens that a sequence can have."""
        ...

    @property
    def chunk(self) -> int | None:
        """Positions of a prompt that are computed together; None: all of them."""
        ...

    @property
    def short_step(self) -> int:
        """Most tokens of a step of which the logits of each are given."""
        ...

    @property
    def batched(self) -> bool:
        """Whether ``step`` computes several sequences, of whatever lengths, in one run."""
        ...

    def begin(self, length: int) -> Sequence:
        """Return a sequence of which nothing is computed, with room for at least ``length`` tokens."""
        ...

    def step(self, sequences: abc.Sequence[Sequence], tokens: abc.Sequence[int]) -> NDArray[np.float32]:
        """Return the logits [n, V] fp32 behind one token more of each of the ``sequences``."""
        ...

    def static_batch(self, prompts: abc.Sequence[abc.Sequence[int]], count: int) -> abc.Iterator[list[int]]:
        """Yield the next greedy token of every sequence, at most ``count`` times.

        All ``prompts`` have one length, and none is padded. Behind its end token a sequence is filled.
        """
        ...

    def drafter(self) -> Drafter:
        """Return what guesses the tokens of one sequence, of which it knows nothing yet."""
        ...

    def close(self) -> None:
        """Free the model, and write profiles that were asked for; sequences have to be closed before."""
        ...


class TrackedSequence(ABC):
    """What all sequences have in common: the tokens, the room for them, and the end.

    A kind of sequence computes in ``_compute``, takes back in ``_rewind`` and frees in ``_free``.
    """

    def __init__(self, capacity: int, chunk: int | None, short_step: int) -> None:
        self.capacity = capacity
        self.tokens: list[int] = []
        self.whole = 0
        self.hidden: NDArray[np.float32] | None = None
        self._chunk = chunk
        self._short_step = short_step
        self._closed = False

    def advance(self, ids: abc.Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """Compute ``ids`` behind ``tokens``, as ``Sequence`` says."""
        before = len(self.tokens)
        self._require(bool(ids), "there are no tokens to compute")
        self._require(before + len(ids) <= self.capacity, f"there is room for {self.capacity} tokens")
        self._require(not every or len(ids) <= self._short_step, f"a short step has {self._short_step} tokens")
        logits = self._compute(list(ids), every)
        self.tokens += ids
        if len(ids) == self._chunk and self.whole == before:
            self.whole += len(ids)
        rows: NDArray[np.float32] = logits.astype(np.float32, copy=False)
        return rows

    def forget(self, count: int) -> None:
        """Take the last ``count`` tokens back, as ``Sequence`` says."""
        self._require(0 <= count <= len(self.tokens), f"there are {len(self.tokens)} tokens to take back")
        if not count:
            return
        length = len(self.tokens) - count
        self._rewind(length)
        del self.tokens[length:]
        self.whole = min(self.whole, length - length % self._chunk if self._chunk else 0)

    def close(self) -> None:
        """Free the memory, once."""
        if not self._closed:
            self._closed = True
            self._free()

    def _require(self, holds: bool, otherwise: str) -> None:
        if self._closed or not holds:
            raise ValueError("the sequence is closed" if self._closed else otherwise)

    @abstractmethod
    def _compute(self, ids: list[int], every: bool) -> NDArray[np.float32]:
        """Return the logits [1, V] behind the last of ``ids``, or [S, V] behind ``every`` one."""

    @abstractmethod
    def _rewind(self, length: int) -> None:
        """Let only the first ``length`` tokens count."""

    @abstractmethod
    def _free(self) -> None:
        """Let go of all memory."""
