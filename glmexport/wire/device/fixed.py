"""Graphs of fixed shapes: texts chunk by chunk; answers by a graph for chunks of a prompt and one for single tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glmexport.wire.device.session import Session


class FixedSession(Session):
    """As ``Session``; with the graph for generation comes that for single tokens."""

    def __init__(self, job: dict[str, Any], folder: Path, graph: str, threads: int, profile: Path | None = None):
        super().__init__(job, folder, graph, threads, profile)
        self._fixed = self._graphs["fixed"]
        self._step: Any = self._open(self._fixed["step"]) if graph == "generation" else None

    def logits(self, ids: Any) -> Any:
        """Logits [length, vocabulary] fp32 after each of ``ids`` [length], from an empty cache."""
        import numpy as np

        caches, chunk = self._empty(self._context), self._fixed["chunk"]
        parts = [self._run(self._session, ids[at : at + chunk], at, caches) for at in range(0, len(ids), chunk)]
        return np.concatenate(parts)

    def stream(self, prompt: Sequence[int], most: int) -> Iterator[int]:
        """The most likely token after ``prompt``, each added to it, until the context or ``most`` tokens are full."""
        caches, chunk = self._empty(self._context), self._fixed["chunk"]
        new, length = list(prompt), 0
        for _ in range(min(most, self._context - len(prompt))):
            while new:
                session, count = (self._session, chunk) if len(new) > 1 else (self._step, 1)
                logits = self._run(session, new[:count], length, caches)
                length += len(new[:count])
                new = new[count:]
            token = int(logits[-1].argmax())
            yield token
            new = [token]

    def end_profile(self) -> list[Path]:
        """The file of every graph's profile, which is whole then."""
        return [*super().end_profile(), Path(self._step.end_profiling())]

    def _run(self, session: Any, ids: Any, start: int, caches: dict[str, Any]) -> Any:
        """Logits [n, vocabulary] behind ``ids`` [n], or [1, vocabulary] behind the last; caches are written into.

        What fills the chunk up is written behind the sequence, where nothing sees it before it is written over.
        """
        import numpy as np

        shapes = {value.name: value.shape for value in session.get_inputs()}
        filled = np.zeros(shapes[self._graphs["input_ids"]], np.int64)
        filled[0, : len(ids)] = ids
        binding = session.io_binding()
        binding.bind_cpu_input(self._graphs["input_ids"], filled)
        places = np.arange(start, start + filled.size, dtype=np.int64)[None]
        binding.bind_cpu_input(self._fixed["position_ids"], places)
        if self._fixed["asked_position"] in shapes:
            binding.bind_cpu_input(self._fixed["asked_position"], np.array([len(ids) - 1], np.int64))
        binding.bind_output(self._graphs["logits"], "cpu")
        for cache in self._graphs["caches"]:
            held = caches[cache["input"]]
            binding.bind_ortvalue_input(cache["input"], held)
            binding.bind_ortvalue_output(cache["output"], held)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()[0, : len(ids)]
