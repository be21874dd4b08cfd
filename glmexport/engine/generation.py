"""The greedy answers of a bundle as it is deployed: token by token, guessed ahead, several together, with logits."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing

import numpy as np
from numpy.typing import NDArray

from glmexport.bundle.bundle import Bundle
from glmexport.engine.core.greedy import distributions, greedy, prefill
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
    def open(
        cls, bundle: Bundle, threads: int, speculation: Speculation | None = None, *, batch: int = 0
    ) -> GenerationSession:
        """Load a bundle, with room for so many answers in a ``batch``; 0: each is computed by itself.

        Raises:
            InputError: the bundle cannot do that speculation, or computes no answers in a batch.
            BundleError: the loop cannot load it.
            MachineError: this ONNX Runtime has no execution provider of the bundle's.
        """
        return cls(open_engine(bundle, threads, batch=batch, speculation=speculation), speculation)

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

    def together(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        """Return the answers to ``prompts`` of any lengths, each cut at its number of tokens in ``limits``.

        Prompts are computed one by one. An engine that computes steps together needs room for all of them.

        Raises:
            InputError: a prompt fills the context.
        """
        rooms = [self._room(len(prompt), limit) for prompt, limit in zip(prompts, limits, strict=True)]
        answers: list[list[int]] = [[] for _ in prompts]
        with ExitStack() as stack:
            sequences = [stack.enter_context(closing(self.engine.begin(len(prompt) + room)))
                         for prompt, room in zip(prompts, rooms, strict=True)]  # fmt: skip
            for sequence, prompt, answer, room in zip(sequences, prompts, answers, rooms, strict=True):
                if room > 0:
                    answer.append(int(prefill(sequence, prompt, self.engine.chunk).argmax()))
            while going := [
                (sequence, answer)
                for sequence, answer, room in zip(sequences, answers, rooms, strict=True)
                if 0 < len(answer) < room and answer[-1] not in self.ends
            ]:
                rows = self.engine.step([sequence for sequence, _ in going], [answer[-1] for _, answer in going])
                for (_, answer), row in zip(going, rows, strict=True):
                    answer.append(int(row.argmax()))
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
