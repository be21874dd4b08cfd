"""The interfaces of an engine and of a sequence in it."""

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
        """The number of first tokens that were computed in whole pieces of a prompt, as in every prompt."""
        ...

    @property
    def hidden(self) -> NDArray[np.float32] | None:
        """The hidden states [1, S, D] after the final norm of the last step, if the engine drafts with them."""
        ...

    def advance(self, ids: abc.Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """Compute ``ids`` after ``tokens``.

        Returns:
            Logits [1, V] fp32 after the last of them, or [S, V] after ``every`` one of a short step.

        Raises:
            ValueError: there are no ids, more than there is room for, or more than a short step has; or the sequence is
                closed.
        """
        ...

    def forget(self, count: int) -> None:
        """Remove the last ``count`` tokens again.

        Raises:
            ValueError: there are fewer.
        """
        ...

    def close(self) -> None:
        """Free the memory; nothing can follow."""
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
        """The number of prompt positions that are computed together; None: all of them."""
        ...

    @property
    def short_step(self) -> int:
        """The most tokens of a step that gives the logits of each."""
        ...

    @property
    def batched(self) -> bool:
        """Whether ``step`` computes several sequences, of whatever lengths, in one run."""
        ...

    def begin(self, length: int) -> Sequence:
        """Return a sequence of which nothing is computed, with room for at least ``length`` tokens."""
        ...

    def step(self, sequences: abc.Sequence[Sequence], tokens: abc.Sequence[int]) -> NDArray[np.float32]:
        """Return the logits [n, V] fp32 after one token more of each of the ``sequences``."""
        ...

    def drafter(self) -> Drafter:
        """Return a drafter for the tokens of one new sequence."""
        ...

    def close(self) -> None:
        """Free the model, and write profiles that were asked for; sequences have to be closed before."""
        ...


class TrackedSequence(ABC):
    """A sequence with what all have in common: the tokens, the room for them, and the end.

    A kind of sequence computes in ``_compute``, removes tokens in ``_rewind`` and frees memory in ``_free``.
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
        """Compute ``ids`` after ``tokens``, as ``Sequence`` says."""
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
        """Remove the last ``count`` tokens again, as ``Sequence`` says."""
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
        """Return the logits [1, V] after the last of ``ids``, or [S, V] after ``every`` one."""

    @abstractmethod
    def _rewind(self, length: int) -> None:
        """Let only the first ``length`` tokens count."""

    @abstractmethod
    def _free(self) -> None:
        """Free all memory."""
