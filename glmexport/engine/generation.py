"""The greedy answers of a bundle as it is deployed: token by token, guessed ahead, several together, with logits."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from glmexport.bundle.bundle import Bundle
from glmexport.engine.core.greedy import distributions, greedy
from glmexport.engine.core.sequence import Engine
from glmexport.engine.opening import open_engine
from glmexport.engine.speculation import Speculation, speculate
from glmexport.foundation.errors import InputError


class GenerationSession:
    """Answers of an ``engine``, which end with an end token, a number of tokens or the context.

    With a ``speculation`` single answers are guessed ahead and verified; several in one batch are not.
    """

    def __init__(self, engine: Engine, speculation: Speculation | None = None) -> None:
        self.engine = engine
        self.ends, self.context_length = engine.ends, engine.context_length
        self._speculation = speculation

    @classmethod
    def open(cls, bundle: Bundle, threads: int, speculation: Speculation | None = None) -> GenerationSession:
        """Load a bundle.

        Raises:
            InputError: the bundle cannot do that speculation.
            BundleError: the loop cannot load it.
            MachineError: this ONNX Runtime has no execution provider of the bundle's.
        """
        return cls(open_engine(bundle, threads, speculation=speculation), speculation)

    def stream(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Yield tokens after ``prompt`` until an end token, which is the last, ``max_tokens`` or the context's end.

        Raises:
            InputError: the prompt fills the context.
        """
        count = self._room(len(prompt), max_tokens)
        answer = self._speculated(prompt, count) if self._speculation else greedy(self.engine, prompt, count)
        with closing(answer) as tokens:
            for token in tokens:
                yield token
                if token in self.ends:
                    return

    def tokens(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Return all that ``stream`` yields."""
        return list(self.stream(prompt, max_tokens))

    def distributions(self, prompt: Sequence[int], max_tokens: int) -> Iterator[NDArray[np.float32]]:
        """Yield the logits [V] fp32 before each greedy token after ``prompt``, as many as ``stream`` yields tokens.

        Raises:
            InputError: the prompt fills the context.
        """
        count = self._room(len(prompt), max_tokens)
        with closing(self.engine.begin(len(prompt) + count)) as sequence:
            for logits in distributions(sequence, prompt, count, self.engine.chunk):
                yield logits
                if int(logits.argmax()) in self.ends:
                    return

    def together(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Return the answers to several prompts of one length in one batch, none of which may be padded.

        Raises:
            InputError: the prompts fill the context.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        for step in self.engine.static_batch(prompts, self._room(len(prompts[0]), max_tokens)):
            for answer, token in zip(answers, step, strict=True):
                # After its end token a sequence is padded while others go on.
                if not (answer and answer[-1] in self.ends):
                    answer.append(token)
            if all(answer[-1] in self.ends for answer in answers):
                break
        return answers

    def _speculated(self, prompt: Sequence[int], count: int) -> Generator[int, None, None]:
        """Yield the same tokens, guessed and verified."""
        assert self._speculation is not None
        if count < 1:
            return
        engine, drafter = self.engine, self.engine.drafter()
        with closing(engine.begin(len(prompt) + count)) as sequence:
            yield from speculate(sequence, drafter, prompt, count, self._speculation, engine.chunk)

    def _room(self, length: int, max_tokens: int) -> int:
        """Return how many tokens can follow a prompt of that ``length``."""
        if length >= self.context_length:
            raise InputError(
                f"The prompt has {length} tokens and the context {self.context_length}.",
                next_step="Shorten the prompt.",
            )
        return min(max_tokens, self.context_length - length)
