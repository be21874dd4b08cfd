"""The engine over onnxruntime-genai."""

from __future__ import annotations

from collections import abc
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.genai_config import GenaiConfig, genai_settings
from glmexport.bundle.names import RECENT_LOGITS, SHORT_STEP
from glmexport.engine.core.drafting import Drafter, PromptLookup
from glmexport.engine.core.greedy import step_alone
from glmexport.engine.core.sequence import Sequence, TrackedSequence
from glmexport.foundation.errors import BundleError


class GenaiEngine:
    """A bundle in onnxruntime-genai. ``profile`` begins the name of a profile of its session.

    Raises:
        MachineError: the bundle's execution provider is not on this machine.
        BundleError: onnxruntime-genai cannot load it.
    """

    batched = False
    short_step = SHORT_STEP

    def __init__(self, bundle: Bundle, config: GenaiConfig, threads: int, profile: Path | None = None) -> None:
        import onnxruntime_genai

        if config.providers:
            # Imported here, as it needs the Python package onnxruntime; a bundle for the processor names no provider.
            from glmexport.engine.session import require_provider

            for name in config.providers:
                require_provider(name, "an ONNX Runtime that has it")
        self._genai = onnxruntime_genai
        self.label = f"onnxruntime-genai {onnxruntime_genai.__version__}"
        self.ends, self.context_length = config.ends, config.context_length
        self.chunk = config.chunk
        try:
            settings = genai_settings(bundle.directory, threads, profile)
            self._model: Any = onnxruntime_genai.Model(settings)
        except RuntimeError as error:
            raise BundleError(
                f"onnxruntime-genai cannot load {bundle.directory}: {str(error).splitlines()[0]}.",
                next_step="Build the bundle again with this version of glmexport.",
            ) from error

    def begin(self, length: int) -> GenaiSequence:
        """Return a sequence of which nothing is computed, with room for ``length`` tokens."""
        parameters: Any = self._genai.GeneratorParams(self._model)
        chunked = {} if self.chunk is None else {"chunk_size": self.chunk}
        parameters.set_search_options(max_length=length, batch_size=1, do_sample=False, **chunked)
        return GenaiSequence(self._genai.Generator(self._model, parameters), length, self.chunk)

    def step(self, sequences: abc.Sequence[Sequence], tokens: abc.Sequence[int]) -> NDArray[np.float32]:
        """Return the logits [n, V] after one token more of each of the ``sequences``, each computed by itself."""
        return step_alone(sequences, tokens)

    def drafter(self) -> Drafter:
        """Return a drafter that guesses by the text so far."""
        return PromptLookup()

    def close(self) -> None:
        """Free the model, which writes the profile that was asked for."""
        self._model = None


class GenaiSequence(TrackedSequence):
    """One sequence in onnxruntime-genai.

    Its ``generator`` gives the last logits only; those of every position of a short step leave the graph by a name of
    their own.
    """

    def __init__(self, generator: Any, capacity: int, chunk: int | None) -> None:
        super().__init__(capacity, chunk, SHORT_STEP)
        self._generator = generator

    def _compute(self, ids: list[int], every: bool) -> NDArray[Any]:
        self._generator.append_tokens(np.array(ids, np.int32))
        logits: NDArray[Any] = self._recent() if every else self._generator.get_logits()
        return logits.reshape(-1, logits.shape[-1])

    def _recent(self) -> Any:
        try:
            return self._generator.get_output(RECENT_LOGITS)
        except RuntimeError as error:
            raise BundleError(
                f"The bundle's graph gives no {RECENT_LOGITS}, by which guesses are verified.",
                next_step="Build the bundle again with this version of glmexport, or leave --speculate out.",
            ) from error

    def _rewind(self, length: int) -> None:
        self._generator.rewind_to(length)

    def _free(self) -> None:
        self._generator = None
