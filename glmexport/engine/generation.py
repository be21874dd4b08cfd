"""Greedy generation from a bundle, as it is deployed: by onnxruntime-genai, or by a loop of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmexport.bundle.genai_config import GenaiConfig, genai_settings
from glmexport.bundle.loop import read_loop
from glmexport.bundle.names import RECENT_LOGITS, SHORT_STEP
from glmexport.engine.fixed_loop import FixedLoop
from glmexport.engine.latent_loop import LatentLoop
from glmexport.engine.own_loop import open_loop
from glmexport.engine.session import require_provider
from glmexport.engine.speculation import Drafter, PromptLookup, Speculation, Step, Verified, speculate
from glmexport.foundation.errors import BundleError, InputError


def loop_facts(bundle: Path) -> tuple[frozenset[int], int]:
    """End tokens of a bundle, and how many tokens its context holds.

    Raises:
        BundleError: the file that says so cannot be read.
    """
    own = read_loop(bundle)
    if own:
        return frozenset(own.eos_token_id), own.context_length
    config = GenaiConfig.read(bundle)
    return config.ends, config.context_length


class GenerationSession:
    """model.onnx of a bundle in the loop that its caches need.

    With a ``speculation`` single answers are guessed ahead and verified; several in one batch are not.

    Raises:
        InputError: the bundle cannot do that speculation.
        BundleError: the loop cannot load it.
        MachineError: this ONNX Runtime has no execution provider of the bundle's.
    """

    def __init__(self, bundle: Path, threads: int, speculation: Speculation | None = None) -> None:
        self._loop: GenaiLoop | LatentLoop | FixedLoop
        self._speculation = speculation
        own = read_loop(bundle)
        if own:
            self._loop = open_loop(bundle, own, threads, speculation=speculation)
        else:
            self._loop = GenaiLoop(bundle, threads, speculation)
        self.ends, self.context_length = loop_facts(bundle)

    def stream(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Tokens after ``prompt`` until an end token, which is the last, ``max_tokens`` or the context's end.

        Raises:
            InputError: the prompt fills the context.
        """
        for token in self._speculated(prompt, max_tokens) if self._speculation else self._alone(prompt, max_tokens):
            yield token
            if token in self.ends:
                return

    def tokens(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """All that ``stream`` gives."""
        return list(self.stream(prompt, max_tokens))

    def distributions(self, prompt: Sequence[int], max_tokens: int) -> Iterator[NDArray[np.float32]]:
        """Logits [vocabulary] fp32 before each greedy token behind ``prompt``, as many as ``stream`` gives tokens.

        Raises:
            InputError: the prompt fills the context.
        """
        for logits in islice(self._loop.distributions(prompt, self._room(len(prompt), max_tokens)), max_tokens):
            yield logits
            if int(logits.argmax()) in self.ends:
                return

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
        count = self._room(len(prompts[0]), max_tokens)
        if isinstance(self._loop, GenaiLoop):
            yield from self._loop.steps(prompts, len(prompts[0]) + count)
        else:
            for tokens in islice(self._loop.start(prompts), count):
                yield tokens.tolist()

    def _alone(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        for step in self._steps([prompt], max_tokens):
            yield step[0]

    def _speculated(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """The same tokens, guessed and verified."""
        assert self._speculation is not None and not isinstance(self._loop, FixedLoop)
        count = self._room(len(prompt), max_tokens)
        return speculate(self.single(prompt, count), self._loop.drafter(), prompt, count, self._speculation)

    def single(self, prompt: Sequence[int], count: int) -> Verified:
        """A sequence of ``prompt`` and ``count`` tokens behind it, of which nothing is computed yet."""
        assert not isinstance(self._loop, FixedLoop), "it verifies nothing"
        return self._loop.single(prompt, len(prompt) + count)

    def _room(self, length: int, max_tokens: int) -> int:
        """How many tokens a prompt of that ``length`` can have behind it."""
        if length >= self.context_length:
            raise InputError(
                f"The prompt has {length} tokens and the context {self.context_length}.",
                next_step="Shorten the prompt.",
            )
        return min(max_tokens, self.context_length - length)


class GenaiLoop:
    """A bundle in onnxruntime-genai.

    Raises:
        InputError: ``speculation`` is none that it can do.
        MachineError: the bundle's execution provider is not on this machine.
        BundleError: onnxruntime-genai cannot load it.
    """

    def __init__(self, bundle: Path, threads: int, speculation: Speculation | None = None) -> None:
        import onnxruntime_genai

        _refuse(bundle, speculation)
        self._genai, self._config = onnxruntime_genai, GenaiConfig.read(bundle)
        for name in self._config.providers:
            require_provider(name, "an ONNX Runtime that has it")
        try:
            self._model = onnxruntime_genai.Model(genai_settings(bundle, threads))
        except RuntimeError as error:
            raise BundleError(
                f"onnxruntime-genai cannot load {bundle}: {str(error).splitlines()[0]}.",
                next_step="Build the bundle again with this version of glmexport.",
            ) from error

    def steps(self, prompts: Sequence[Sequence[int]], max_length: int) -> Iterator[list[int]]:
        """The next token of every sequence, until all have ended or are ``max_length`` long."""
        generator = self.generator(len(prompts), max_length)
        generator.append_tokens(np.array(prompts, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            yield [int(token) for token in generator.get_next_tokens()]

    def distributions(self, prompt: Sequence[int], count: int) -> Iterator[NDArray[np.float32]]:
        """Logits [vocabulary] fp32 before each of at most ``count`` greedy tokens behind ``prompt``."""
        generator = self.generator(1, len(prompt) + count)
        generator.append_tokens(np.array([prompt], np.int32))
        while not generator.is_done():
            yield np.array(generator.get_logits(), np.float32)[0, -1]
            generator.generate_next_token()

    def single(self, prompt: Sequence[int], max_length: int) -> Verified:
        """One sequence of at most ``max_length`` tokens, which begins with ``prompt``; nothing of it is computed."""
        return GenaiSequence(self.generator(1, max_length), len(prompt))

    def drafter(self) -> Drafter:
        """What guesses the tokens of a sequence, of which it knows nothing yet."""
        return PromptLookup()

    @property
    def chunk(self) -> int | None:
        """Positions of a single prompt that are computed together; None: all of them."""
        return self._config.search_options(1).get("chunk_size")

    def generator(self, batch: int, max_length: int) -> Any:
        """A generator of onnxruntime-genai, greedy."""
        parameters: Any = self._genai.GeneratorParams(self._model)
        given = {"do_sample": False, **self._config.search_options(batch)}
        parameters.set_search_options(max_length=max_length, batch_size=batch, **given)
        return self._genai.Generator(self._model, parameters)


def _refuse(bundle: Path, speculation: Speculation | None) -> None:
    if speculation and speculation.method == "mtp":
        raise InputError(
            f"{bundle} runs in onnxruntime-genai, and drafts by MTP are made only where latents are cached.",
            next_step="Take --speculate lookup or none.",
        )
    if speculation and speculation.tokens >= SHORT_STEP:
        raise InputError(
            f"The graph verifies {SHORT_STEP - 1} tokens at a time, and {speculation.tokens} are to be guessed.",
            next_step="Guess fewer.",
        )


class GenaiSequence:
    """One sequence in onnxruntime-genai, whose prompt of ``length`` tokens is computed in one step.

    Its generator gives the last logits only; those of every position of a short step leave the graph by a name of
    their own.
    """

    def __init__(self, generator: Any, length: int) -> None:
        self._generator = generator
        self.chunk = length

    def advance(self, ids: NDArray[np.int64]) -> Step:
        """Compute ``ids`` [1, new] behind what was computed before."""
        self._generator.append_tokens(ids.astype(np.int32))
        try:
            logits = self._generator.get_output(RECENT_LOGITS)
        except RuntimeError as error:
            raise BundleError(
                f"The bundle's graph gives no {RECENT_LOGITS}, by which guesses are verified.",
                next_step="Build the bundle again with this version of glmexport, or leave --speculate out.",
            ) from error
        return Step(logits.argmax(-1))

    def forget(self, count: int) -> None:
        """Take the last ``count`` tokens back."""
        if count:
            self._generator.rewind_to(self._generator.token_count() - count)
