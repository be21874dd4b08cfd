"""The likelihood of texts after contexts, by a bundle in ONNX Runtime and by a checkpoint block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Progress
from glmexport.reference.reference import Reference
from glmexport.validation.reference import reference_states
from glmexport.validation.texts import EvaluationText

T = TypeVar("T")

#: Number of tokens whose hidden states are on the disk at a time: 1 GiB at a width of 4096.
TOKENS = 65536
#: Number of positions whose logits are in memory at a time: 300 MiB with 150 000 tokens. The lm_head is read once for
#: them.
_ROWS = 512
#: Number of texts that go through a block together.
_BATCH = 8


@dataclass(frozen=True)
class Request:
    """Token ids whose likelihood is asked for, after those of a context, which has one at least."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The token ids that the model has to read: all but the last."""
        return (*self.context, *self.continuation)[:-1]


class Likelihood(NamedTuple):
    """The log-probability of a continuation in nats, and whether greedy decoding would have given it."""

    log_p: float
    greedy: bool


def fitted(request: Request, prefix: Sequence[int], window: int) -> Request:
    """Return the request with its context cut from the left, after ``prefix``, until the model can read it.

    Raises:
        InputError: the continuation alone is too long.
    """
    excess = len(request.inputs) - window
    if excess <= 0 or not request.continuation:
        return request
    kept = len(prefix) if request.context[: len(prefix)] == tuple(prefix) else 0
    if excess > len(request.context) - max(kept, 1):
        raise InputError(
            f"A continuation has {len(request.continuation)} tokens and the context {window}.",
            next_step="Leave such texts out, or shorten them.",
        )
    return Request((*request.context[:kept], *request.context[kept + excess :]), request.continuation)


def windows(tokens: Sequence[int], prefix: Sequence[int], window: int) -> Iterator[Request]:
    """Yield requests that a model can read for a text of any length, in which each token is predicted once.

    Each begins with ``prefix``. All but the first have one token of context, and the last one as many as fit.

    Raises:
        InputError: nothing fits after the prefix.
    """
    room = window - len(prefix)
    if room < 1:
        raise InputError(
            f"The context has {window} tokens, and {len(prefix)} begin every text.", next_step="Take a longer context."
        )
    start = 0
    while start < len(tokens):
        # The last token of a request is not read, and the one before the others is, from the second request on.
        stop = min(start + room + (start == 0), len(tokens))
        before = max(0, stop - 1 - room) if start else 0
        yield Request((*prefix, *tokens[before:start]), tuple(tokens[start:stop]))
        start = stop


def bundle_likelihoods(
    session: ScoringSession, requests: Sequence[Request], progress: Progress
) -> list[Likelihood]:
    """Return the likelihood of every request.

    A text that several have to read, such as a question with choices of one token, is read once.
    """
    tally = _Tally(requests)
    with progress.track("Likelihoods", len(tally.readers)) as track:
        for inputs, readers in tally.readers.items():
            logits = torch.from_numpy(session.logits(np.array(inputs, np.int64)))
            for reader in readers:
                rows = logits[len(requests[reader].context) - 1 :]
                tally.add(rows, [(reader, token) for token in requests[reader].continuation])
            track.advance()
    return tally.likelihoods


def checkpoint_likelihoods(
    reference: Reference, requests: Sequence[Request], scratch: Path, progress: Progress
) -> list[Likelihood]:
    """Return the same by a checkpoint in transformers' arithmetic, in fp32, one block in memory at a time.

    ``scratch`` holds the hidden states meanwhile.
    """
    tally = _Tally(requests)
    # Texts of nearly the same length are together, to have little padding.
    order = sorted(tally.readers, key=len)
    for part in portions(order, len, TOKENS):
        texts = [EvaluationText(str(index), "", torch.tensor(inputs), 1) for index, inputs in enumerate(part)]
        states = reference_states(reference, texts, scratch, progress, label="Likelihoods", batch=_BATCH)
        rows: list[Tensor] = []
        wanted: list[tuple[int, int]] = []
        for index, inputs in enumerate(part):
            hidden = states.load(index)[0]
            for reader in tally.readers[inputs]:
                request = requests[reader]
                rows.append(hidden[len(request.context) - 1 :])
                wanted += [(reader, token) for token in request.continuation]
            if len(wanted) >= _ROWS or index == len(part) - 1:
                together = torch.cat(rows)
                for start in range(0, len(wanted), _ROWS):
                    stop = start + _ROWS
                    tally.add(reference.logits(together[start:stop]), wanted[start:stop])
                rows, wanted = [], []
    return tally.likelihoods


def portions(items: Sequence[T], length: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Yield ``items`` in order, with a ``length`` of no more than ``most`` in each portion, or a single item."""
    portion: list[T] = []
    size = 0
    for item in items:
        if portion and size + length(item) > most:
            yield portion
            portion, size = [], 0
        portion.append(item)
        size += length(item)
    if portion:
        yield portion


class _Tally:
    """Sums over the tokens of every request; a request without tokens is certain."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._log_p = [0.0] * len(requests)
        self._greedy = [True] * len(requests)
        readers: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            if request.continuation:
                readers.setdefault(request.inputs, []).append(index)
        #: The indices of the requests that have to read the same text, by that text.
        self.readers: Mapping[tuple[int, ...], Sequence[int]] = readers

    def add(self, logits: Tensor, wanted: Sequence[tuple[int, int]]) -> None:
        """Add rows of ``logits`` [positions, vocabulary], each with the request and the token that it predicts."""
        log_p = logits.double().log_softmax(-1)
        tokens = torch.tensor([token for _, token in wanted])
        chances = log_p.gather(-1, tokens[:, None])[:, 0].tolist()
        likeliest = logits.argmax(-1).tolist()
        for (reader, token), chance, best in zip(wanted, chances, likeliest, strict=True):
            self._log_p[reader] += chance
            self._greedy[reader] &= best == token

    @property
    def likelihoods(self) -> list[Likelihood]:
        """The likelihood of every request."""
        return [Likelihood(log_p, greedy) for log_p, greedy in zip(self._log_p, self._greedy, strict=True)]
