"""Greedy generation over caches of a fixed capacity, by ONNX Runtime itself: latents, and keys of an indexer.

A cache is one buffer, the graph's input and its output: new positions are written into it and nothing is copied. It
grows by whole steps, so that little of it is empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from glmexport.loop import LoopConfig
from glmexport.validation.session import open_session

#: Positions that a cache grows by.
GROWTH = 256
#: Positions of a prompt that are computed together: their scores against the whole cache are held for every head.
CHUNK = 256


class LatentLoop:
    """The graph of a bundle in ONNX Runtime. ``config`` is its loop.json; ``profile`` begins the name of a profile.

    Raises:
        MachineError: this ONNX Runtime has no execution provider of that name.
        BundleError: ONNX Runtime refuses the graph.
    """

    def __init__(self, bundle: Path, config: LoopConfig, threads: int, profile: Path | None = None) -> None:
        self._config = config
        self._session = open_session(bundle / config.graph, config.provider, threads, profile)
        self.context_length = config.context_length
        #: Width by name of every cache among the inputs.
        self._widths: dict[str, int] = {
            value.name: value.shape[2] for value in self._session.get_inputs() if value.name in config.caches
        }

    @property
    def cache_bytes_per_token(self) -> int:
        """Of one sequence, over all layers."""
        return 4 * sum(self._widths.values())

    def end_profile(self) -> Path:
        """The file of the profile, which is whole then."""
        return Path(self._session.end_profiling())

    def start(self, prompts: Sequence[Sequence[int]]) -> LatentSequences:
        """Sequences of one length, of which nothing is computed yet."""
        return LatentSequences(self, np.array(prompts, np.int64))

    def run(
        self, ids: NDArray[np.int64], length: int, caches: dict[str, onnxruntime.OrtValue]
    ) -> NDArray[np.float32]:
        """Logits [batch, vocabulary] behind ``ids`` [batch, new], which end at ``length``; writes the caches."""
        binding = self._session.io_binding()
        binding.bind_cpu_input(self._config.input_ids, np.ascontiguousarray(ids))
        binding.bind_cpu_input(self._config.attention_mask, np.ones((len(ids), length), np.int64))
        binding.bind_output(self._config.logits, "cpu")
        for name, cache in caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(self._config.caches[name], cache)
        self._session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = binding.get_outputs()[0].numpy()
        return logits[:, -1]

    def caches(
        self, batch: int, capacity: int, former: Mapping[str, onnxruntime.OrtValue]
    ) -> dict[str, onnxruntime.OrtValue]:
        """New caches [batch, capacity, width], which begin with what the ``former`` ones hold."""
        grown = {}
        for name, width in self._widths.items():
            values = np.zeros((batch, capacity, width), np.float32)
            if name in former:
                held = former[name].numpy()
                values[:, : held.shape[1]] = held
            grown[name] = onnxruntime.OrtValue.ortvalue_from_numpy(values)
        return grown


class LatentSequences:
    """Sequences that are generated together, and their caches."""

    def __init__(self, loop: LatentLoop, ids: NDArray[np.int64]) -> None:
        self._loop = loop
        self._new = ids
        self._length = 0
        self._capacity = 0
        self._caches: dict[str, onnxruntime.OrtValue] = {}

    @property
    def cache_bytes(self) -> int:
        """What all caches take."""
        return sum(4 * math.prod(cache.shape()) for cache in self._caches.values())

    @property
    def capacity(self) -> int:
        """Positions that the caches have room for."""
        return self._capacity

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """The most likely token [batch] of every sequence, again and again, each added to its sequence."""
        while True:
            for start in range(0, self._new.shape[1], CHUNK):
                logits = self._advance(self._new[:, start : start + CHUNK])
            tokens: NDArray[np.int64] = logits.argmax(-1)
            self._new = tokens[:, None]
            yield tokens

    def _advance(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._length += ids.shape[1]
        if self._length > self._capacity:
            wanted = -(-self._length // GROWTH) * GROWTH
            self._capacity = min(wanted, self._loop.context_length)
            self._caches = self._loop.caches(len(ids), self._capacity, self._caches)
        return self._loop.run(ids, self._length, self._caches)
