"""The logits of every position of a text, as scoring.onnx computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.fit import require_memory
from glmexport.bundle.genai_config import GenaiConfig
from glmexport.bundle.loop import FixedLoopConfig, LoopConfig
from glmexport.bundle.names import ATTENTION_MASK, INPUT_IDS, LOGITS, SCORING
from glmexport.engine.core.cache import unkept_specs
from glmexport.engine.core.graphs import FixedGraph, GraphNames, MaskedGraph
from glmexport.engine.graph_opening import fixed_names
from glmexport.engine.session import open_session
from glmexport.foundation.errors import InputError


class Scorer(Protocol):
    """A graph that gives the logits of every position."""

    def scores(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return the logits [length, V] after each of ``ids`` [length], from empty caches."""
        ...


class ScoringSession:
    """The graph scoring.onnx of a bundle, for logits of every position.

    Raises:
        MachineError: this ONNX Runtime has no execution provider of the target's name, or memory lacks.
        BundleError: ONNX Runtime refuses the graph, or the file of the bundle's loop is broken.
    """

    def __init__(self, bundle: Bundle, threads: int) -> None:
        require_memory(bundle)
        target = bundle.manifest.target
        session = open_session(bundle.directory / SCORING, target.provider, threads, config=target.session.config)
        self.session = session
        self._scorer, self._most = _SCORERS[type(bundle.loop)](session, bundle.loop)

    def logits(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return the logits [length, V] fp32 after each of ``ids`` [length] int64, from empty caches.

        Raises:
            InputError: caches of a fixed capacity do not hold so many positions.
        """
        if self._most is not None:
            require_room(len(ids), self._most)
        return self._scorer.scores(ids)


def require_room(tokens: int, context_length: int) -> None:
    """Raise InputError if caches of that capacity do not hold a text of so many ``tokens``."""
    if tokens > context_length:
        raise InputError(
            f"A text has {tokens} tokens, and the caches of the bundle hold {context_length}.",
            next_step="Give shorter texts, or a reference that was captured of such.",
        )


def _any_length(session: onnxruntime.InferenceSession, config: object) -> tuple[Scorer, int | None]:
    caches = unkept_specs(session, (INPUT_IDS, ATTENTION_MASK))
    return MaskedGraph(session, GraphNames(INPUT_IDS, ATTENTION_MASK, LOGITS, caches, LOGITS)), None


def _fixed_shapes(session: onnxruntime.InferenceSession, config: FixedLoopConfig) -> tuple[Scorer, int | None]:
    return FixedGraph(session, fixed_names(config, session)), config.context_length


_SCORERS: Mapping[
    type[LoopConfig | FixedLoopConfig | GenaiConfig],
    Callable[[onnxruntime.InferenceSession, Any], tuple[Scorer, int | None]],
] = {GenaiConfig: _any_length, LoopConfig: _any_length, FixedLoopConfig: _fixed_shapes}
