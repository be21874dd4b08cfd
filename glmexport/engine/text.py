"""The text of a bundle's answer, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from glmexport.bundle.bundle import Bundle
from glmexport.engine.generation import GenerationSession
from glmexport.engine.speculation import Speculation


@dataclass(frozen=True)
class Piece:
    """A generated token and the text that became certain with it; a character of several tokens comes with the last."""

    token: int
    text: str


def generate(
    bundle: Bundle,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    threads: int,
    speculation: Speculation | None = None,
) -> Iterator[Piece]:
    """Yield tokens after ``prompt`` until an end token, ``max_tokens`` or the context's end, without end tokens.

    Raises:
        BundleError: the bundle's loop cannot load it.
        InputError: the prompt fills the context, or the bundle cannot do that ``speculation``.
    """
    session = GenerationSession.open(bundle, threads, speculation)
    tokens: list[int] = []
    shown = ""
    for token in session.stream(prompt, max_tokens):
        if token in session.ends:
            break
        tokens.append(token)
        text = bundle.tokenizer.decode(tokens)
        # A replacement character at the end is the first part of a character still to come.
        complete = text if not text.endswith("\ufffd") else shown
        yield Piece(token, complete[len(shown) :])
        shown = complete
