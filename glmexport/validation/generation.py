"""Greedy generation from a bundle through onnxruntime-genai, as it is deployed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from glmexport.errors import BundleError, InputError


class GenerationSession:
    """model.onnx of a bundle in onnxruntime-genai.

    Raises:
        BundleError: onnxruntime-genai cannot load it.
    """

    def __init__(self, bundle: Path, threads: int) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.ends = frozenset(config["eos_token_id"])
        self.context_length = int(config["context_length"])
        try:
            settings = onnxruntime_genai.Config(str(bundle))
            options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
            settings.overlay(json.dumps(options))
            self._model = onnxruntime_genai.Model(settings)
        except RuntimeError as error:
            raise BundleError(
                f"onnxruntime-genai cannot load {bundle}: {str(error).splitlines()[0]}.",
                next_step="Build the bundle again with this version of glmexport.",
            ) from error

    def stream(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Tokens after ``prompt`` until an end token, which is the last, ``max_tokens`` or the context's end.

        Raises:
            InputError: the prompt fills the context.
        """
        generator = self._generator([prompt], max_tokens)
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            yield token
            if token in self.ends:
                return

    def tokens(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """All that ``stream`` gives."""
        return list(self.stream(prompt, max_tokens))

    def together(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """The same for several prompts of one length in one batch, none of which may be padded."""
        generator = self._generator(prompts, max_tokens)
        while not generator.is_done():
            generator.generate_next_token()
        return [self._answer(generator.get_sequence(row)[len(prompts[row]) :]) for row in range(len(prompts))]

    def _generator(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Any:
        length = len(prompts[0])
        if length >= self.context_length:
            raise InputError(
                f"The prompt has {length} tokens and the context {self.context_length}.",
                next_step="Shorten the prompt.",
            )
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=min(length + max_tokens, self.context_length), do_sample=False, batch_size=len(prompts)
        )
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompts, np.int32))
        return generator

    def _answer(self, generated: Sequence[int]) -> list[int]:
        """Up to the first end token; behind it a sequence is padded while others go on."""
        tokens = [int(token) for token in generated]
        end = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens))
        return list(islice(tokens, end + 1))
