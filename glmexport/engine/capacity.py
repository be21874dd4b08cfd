"""A graph with caches of a fixed capacity in ONNX Runtime: each is one buffer, the graph's input and its output.

New positions are written into it and nothing is copied. It grows by whole steps, so that little of it is empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from glmexport.bundle.loop import DraftConfig, LoopConfig

#: Positions that a cache grows by.
GROWTH = 256


class CapacityGraph:
    """A graph of a bundle. ``config`` has its names; caches hold ``context_length`` positions at most."""

    def __init__(
        self, session: onnxruntime.InferenceSession, config: LoopConfig | DraftConfig, context_length: int
    ) -> None:
        self.session = session
        self.config = config
        self.context_length = context_length
        #: Width by name of every cache among the inputs.
        self.widths: dict[str, int] = {
            value.name: value.shape[2] for value in session.get_inputs() if value.name in config.caches
        }

    def begin(self, batch: int) -> Caches:
        """Caches of sequences of one length, of which nothing is computed yet."""
        return Caches(self, batch)


class Caches:
    """Of sequences that are computed together. ``length``: positions of each that count."""

    def __init__(self, graph: CapacityGraph, batch: int) -> None:
        self._graph = graph
        self._batch = batch
        self.length = 0
        #: Positions that there is room for.
        self.capacity = 0
        self._values: dict[str, onnxruntime.OrtValue] = {}

    @property
    def bytes(self) -> int:
        """What all of them take."""
        return sum(4 * math.prod(value.shape()) for value in self._values.values())

    def run(
        self, ids: NDArray[np.int64], inputs: Mapping[str, NDArray[np.float32]], outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """Compute ``ids`` [batch, new] behind what counts so far, and return ``outputs``."""
        self.length += ids.shape[1]
        self._make_room()
        graph, config = self._graph, self._graph.config
        binding = graph.session.io_binding()
        binding.bind_cpu_input(config.input_ids, np.ascontiguousarray(ids))
        binding.bind_cpu_input(config.attention_mask, np.ones((self._batch, self.length), np.int64))
        for name, values in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(values))
        for name in outputs:
            binding.bind_output(name, "cpu")
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(config.caches[name], value)
        graph.session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[: len(outputs)]]

    def forget(self, count: int) -> None:
        """Take the last ``count`` positions back: what is behind the length is written over."""
        self.length -= count

    def _make_room(self) -> None:
        """Longer caches, which begin with what the present ones hold."""
        if self.length <= self.capacity:
            return
        wanted = -(-self.length // GROWTH) * GROWTH
        self.capacity = min(wanted, self._graph.context_length)
        for name, width in self._graph.widths.items():
            values = np.zeros((self._batch, self.capacity, width), np.float32)
            if name in self._values:
                held = self._values[name].numpy()
                values[:, : held.shape[1]] = held
            self._values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(values)
