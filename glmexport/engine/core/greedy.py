"""Greedy generation: the most likely token, again and again."""

from __future__ import annotations

from collections import abc
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from glmexport.engine.core.sequence import Engine, Sequence


def prefill(sequence: Sequence, prompt: abc.Sequence[int], chunk: int | None) -> NDArray[np.float32]:
    """Compute a ``prompt`` in pieces of ``chunk``, and return the logits [V] after its last token."""
    size = chunk or len(prompt)
    for start in range(0, len(prompt), size):
        logits = sequence.advance(prompt[start : start + size])
    last: NDArray[np.float32] = logits[-1]
    return last


def distributions(
    sequence: Sequence, prompt: abc.Sequence[int], count: int, chunk: int | None
) -> abc.Iterator[NDArray[np.float32]]:
    """Yield the logits [V] fp32 before each of ``count`` greedy tokens after ``prompt``."""
    if count < 1:
        return
    logits = prefill(sequence, prompt, chunk)
    yield logits
    for _ in range(count - 1):
        logits = sequence.advance([int(logits.argmax())])[-1]
        yield logits


def greedy(engine: Engine, prompt: abc.Sequence[int], count: int) -> abc.Generator[int, None, None]:
    """Yield the greedy tokens after ``prompt``, ``count`` of them whether or not one ends an answer."""
    if count < 1:
        return
    with closing(engine.begin(len(prompt) + count)) as sequence:
        token = int(prefill(sequence, prompt, engine.chunk).argmax())
        yield token
        for _ in range(count - 1):
            token = int(sequence.advance([token])[-1].argmax())
            yield token


def step_alone(sequences: abc.Sequence[Sequence], tokens: abc.Sequence[int]) -> NDArray[np.float32]:
    """Return the logits [n, V] after one token more of each of the ``sequences``, each computed by itself."""
    return np.concatenate([sequence.advance([token]) for sequence, token in zip(sequences, tokens)])
