"""Greedy generation from a bundle, as it is deployed: by onnxruntime-genai, or over latents by a loop of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from glmexport.bundle.genai import GENAI_CONFIG
from glmexport.errors import BundleError, InputError
from glmexport.loop import read_loop
from glmexport.validation.latent_loop import LatentLoop


def loop_facts(bundle: Path) -> tuple[frozenset[int], int]:
    """End tokens of a bundle, and how many tokens its context holds.

    Raises:
        BundleError: the file that says so cannot be read.
    """
    latents = read_loop(bundle)
    if latents:
        return frozenset(latents.eos_token_id), latents.context_length
    config = json.loads((bundle / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]
    return frozenset(config["eos_token_id"]), int(config["context_length"])


class GenerationSession:
    """model.onnx of a bundle in the loop that its caches need.

    Raises:
        BundleError: the loop cannot load it.
        MachineError: this ONNX Runtime has no execution provider of the bundle's.
    """

    def __init__(self, bundle: Path, threads: int) -> None:
        latents = read_loop(bundle)
        self._loop = LatentLoop(bundle, latents, threads) if latents else GenaiLoop(bundle, threads)
        self.ends, self.context_length = loop_facts(bundle)

    def stream(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Tokens after ``prompt`` until an end token, which is the last, ``max_tokens`` or the context's end.

        Raises:
            InputError: the prompt fills the context.
        """
        for step in self._steps([prompt], max_tokens):
            yield step[0]
            if step[0] in self.ends:
                return

    def tokens(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """All that ``stream`` gives."""
        return list(self.stream(prompt, max_tokens))

    def together(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """The same for several prompts of one length in one batch, none of which may be padded."""
        answers: list[list[int]] = [[] for _ in prompts]
        for step in self._steps(prompts, max_tokens):
            for answer, token in zip(answers, step, strict=True):
                # Behind its end token a sequence is filled while others go on.
                if not (answer and answer[-1] in self.ends):
                    answer.append(token)
            if all(answer[-1] in self.ends for answer in answers):
                break
        return answers

    def _steps(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
        """The next token of every sequence, as often as the context allows."""
        length = len(prompts[0])
        if length >= self.context_length:
            raise InputError(
                f"The prompt has {length} tokens and the context {self.context_length}.",
                next_step="Shorten the prompt.",
            )
        count = min(max_tokens, self.context_length - length)
        if isinstance(self._loop, LatentLoop):
            for tokens in islice(self._loop.start(prompts), count):
                yield tokens.tolist()
        else:
            yield from self._loop.steps(prompts, length + count)


class GenaiLoop:
    """A bundle in onnxruntime-genai.

    Raises:
        BundleError: onnxruntime-genai cannot load it.
    """

    def __init__(self, bundle: Path, threads: int) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
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

    def steps(self, prompts: Sequence[Sequence[int]], max_length: int) -> Iterator[list[int]]:
        """The next token of every sequence, until all have ended or are ``max_length`` long."""
        parameters: Any = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=max_length, do_sample=False, batch_size=len(prompts))
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompts, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            yield [int(token) for token in generator.get_next_tokens()]
