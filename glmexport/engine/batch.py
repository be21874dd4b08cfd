"""Many answers in one step: caches of several sequences side by side, whose next tokens are computed together.

A processor reads the weights once for all of them, so that a step of eight costs little more than one of two. It adds
numbers up in another order than for one alone: what an answer is then depends, by rounding, on who else asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glmexport.bundle.genai_config import PREFILL_TOKENS
from glmexport.bundle.manifest import read_manifest
from glmexport.bundle.names import ATTENTION_MASK, INPUT_IDS, LOGITS, MODEL, RECENT_LOGITS
from glmexport.engine.caches import CACHE_TYPES
from glmexport.engine.session import open_session
from glmexport.foundation.errors import InputError
from glmexport.foundation.host import CPU_PROVIDER

#: Positions that all caches grow by.
_GROWTH = 1024
_PAST, _PRESENT = "past_key_values", "present"


class BatchLoop:
    """The graph of the bundle in ``directory``, with caches of ``slots`` sequences.

    Raises:
        InputError: it does not run on the CPU's provider, whose memory can be shared out.
        BundleError: ONNX Runtime refuses the graph.
    """

    chunk = PREFILL_TOKENS

    def __init__(self, directory: Path, threads: int, slots: int, context_length: int) -> None:
        target = read_manifest(directory).target
        if target.provider.name != CPU_PROVIDER:
            raise InputError(
                f"Answers are computed together on {CPU_PROVIDER} alone, and {directory} is for another provider.",
                next_step="Leave --batch out.",
            )
        self._session = open_session(directory / MODEL, target.provider, threads, config=target.session.config)
        self._context_length = context_length
        self._kinds = {
            value.name: (value.shape[1], value.shape[3], CACHE_TYPES[value.type])
            for value in self._session.get_inputs()
            if value.name.startswith(_PAST)
        }
        self._slots: list[BatchedSequence | None] = [None] * slots
        self._capacity = 0
        self._caches: dict[str, NDArray[np.generic]] = {}

    def begin(self) -> BatchedSequence:
        """A sequence of which nothing is computed, in a slot that is free."""
        slot = self._slots.index(None)
        sequence = BatchedSequence(self, slot, self._context_length)
        self._slots[slot] = sequence
        return sequence

    def free(self, sequence: BatchedSequence) -> None:
        """Its slot is another's."""
        self._slots[sequence.slot] = None

    def step(self, sequences: Sequence[BatchedSequence], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n, V] behind a token more of each of the sequences."""
        first, last = (pick(sequence.slot for sequence in sequences) for pick in (min, max))
        ids = np.zeros((last - first + 1, 1), np.int64)
        for sequence, token in zip(sequences, tokens, strict=True):
            ids[sequence.slot - first] = token
        # Slots in between compute along: what is written there stands behind what counts.
        held = (self._slots[slot] for slot in range(first, last + 1))
        lengths = [1 + (len(other.tokens) if other else 0) for other in held]
        logits = self.run(first, ids, lengths, LOGITS)
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.tokens.append(token)
        rows: NDArray[np.float32] = logits[[sequence.slot - first for sequence in sequences], -1]
        return rows

    def run(self, first: int, ids: NDArray[np.int64], lengths: Sequence[int], output: str) -> NDArray[np.float32]:
        """Compute ``ids`` [n, S] of the slots from ``first`` on, which are ``lengths`` long with them."""
        longest = max(lengths)
        self._make_room(longest)
        mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
        binding = self._session.io_binding()
        binding.bind_cpu_input(INPUT_IDS, ids)
        binding.bind_cpu_input(ATTENTION_MASK, mask)
        binding.bind_output(output, "cpu")
        for name, cache in self._caches.items():
            part = cache[first : first + len(ids)]
            where = ("cpu", 0, part.dtype, part.shape, part.ctypes.data)
            binding.bind_input(name, *where)
            binding.bind_output(name.replace(_PAST, _PRESENT), *where)
        self._session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = binding.get_outputs()[0].numpy().astype(np.float32, copy=False)
        return logits

    def _make_room(self, length: int) -> None:
        """Longer caches, which begin with what the present ones hold."""
        if length <= self._capacity:
            return
        self._capacity = min(-(-length // _GROWTH) * _GROWTH, self._context_length)
        for name, (heads, width, kind) in self._kinds.items():
            grown = np.zeros((len(self._slots), heads, self._capacity, width), kind)
            if name in self._caches:
                held = self._caches[name]
                grown[:, :, : held.shape[2]] = held
            self._caches[name] = grown


class BatchedSequence:
    """One of the sequences, as ``Computed`` is; in the ``slot`` of its own."""

    def __init__(self, loop: BatchLoop, slot: int, capacity: int) -> None:
        self._loop = loop
        self.slot = slot
        self.capacity = capacity
        self.tokens: list[int] = []
        self.whole = 0

    def advance(self, ids: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """As ``Computed``; it alone."""
        output = RECENT_LOGITS if every else LOGITS
        logits = self._loop.run(self.slot, np.array([ids], np.int64), [len(self.tokens) + len(ids)], output)
        self.tokens += ids
        rows: NDArray[np.float32] = logits[0]
        return rows

    def forget(self, count: int) -> None:
        """As ``Computed``: what is behind the length is written over."""
        if count:
            del self.tokens[-count:]

    def close(self) -> None:
        """Give the slot back."""
        self._loop.free(self)
