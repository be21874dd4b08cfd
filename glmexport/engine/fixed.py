"""A graph of fixed shapes in ONNX Runtime: one sequence, so many new positions, caches of so many positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from glmexport.bundle.loop import FixedLoopConfig
from glmexport.engine.caches import empty_cache
from glmexport.foundation.errors import InputError

#: By input: each is one buffer, a graph's input and its output. Every graph of a bundle takes the same.
Caches = dict[str, onnxruntime.OrtValue]


class FixedGraph:
    """One graph of a bundle, whose loop.json is ``config``. ``positions``: new ones of a run."""

    def __init__(self, session: onnxruntime.InferenceSession, config: FixedLoopConfig) -> None:
        self.session = session
        self._config = config
        self._inputs = {value.name: value for value in session.get_inputs()}
        self.positions = int(self._inputs[config.input_ids].shape[1])

    def begin(self) -> Caches:
        """Caches of a sequence of which nothing is computed yet."""
        return {name: empty_cache(self._inputs[name].shape, self._inputs[name].type) for name in self._config.caches}

    def run(self, caches: Caches, ids: Sequence[int] | NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Compute ``ids`` [n], n at most ``positions``, from position ``start`` on.

        What fills the graph up behind them is written into the caches behind the sequence, where nothing sees it
        before it is written over. Returns the logits [n, vocabulary] of all, or [1, vocabulary] of the last one, as
        the graph gives them.
        """
        config, count = self._config, len(ids)
        filled = np.zeros((1, self.positions), np.int64)
        filled[0, :count] = ids
        binding = self.session.io_binding()
        binding.bind_cpu_input(config.input_ids, filled)
        binding.bind_cpu_input(config.position_ids, np.arange(start, start + self.positions, dtype=np.int64)[None])
        if config.asked_position in self._inputs:
            binding.bind_cpu_input(config.asked_position, np.array([count - 1], np.int64))
        binding.bind_output(config.logits, "cpu")
        for name, value in caches.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(config.caches[name], value)
        self.session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = binding.get_outputs()[0].numpy()
        return logits[0, :count]

    def scores(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [length, vocabulary] after each of ``ids`` [length], chunk by chunk; the graph gives those of all.

        Raises:
            InputError: the caches do not hold so many.
        """
        require_room(len(ids), self._config.context_length)
        caches, starts = self.begin(), range(0, len(ids), self.positions)
        return np.concatenate([self.run(caches, ids[start : start + self.positions], start) for start in starts])


def require_room(tokens: int, context_length: int) -> None:
    """Raise InputError if caches of that capacity do not hold a text of so many ``tokens``."""
    if tokens > context_length:
        raise InputError(
            f"A text has {tokens} tokens, and the caches of the bundle hold {context_length}.",
            next_step="Give shorter texts, or a reference that was captured of such.",
        )
