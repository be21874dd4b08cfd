"""GitHub's Markdown from text that is not ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from glmexport.foundation.untrusted import visible

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&:@])")
#: What has a meaning within a line, other than the signs of numbers.
_WITHIN = re.compile(r"([\\`*_\[\]!|<>~&@]|(?<=www)\.|:(?=//))")
_DIGEST = re.compile(r"[0-9A-Za-z:]+")


class Markdown(str):
    """Text that is Markdown already; any other has no meaning to it."""

    __slots__ = ()


def foreign(words: str) -> Markdown:
    """Text that is not ours, on one line and without any meaning to Markdown."""
    return Markdown(_SPECIAL.sub(r"\\\1", visible(words)))


def code(digest: str) -> Markdown:
    """A digest in the font of code; what cannot be one is text."""
    return Markdown(f"`{digest}`") if _DIGEST.fullmatch(digest) else foreign(digest)


def strong(words: str) -> Markdown:
    """Text in bold."""
    return Markdown(f"**{foreign(words)}**")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Markdown:
    """A table of cells, each row as long as ``head``; what is no ``Markdown`` in it has no meaning to Markdown."""
    lines = [map(_cell, head), ["---"] * len(head), *(map(_cell, row) for row in rows)]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _cell(words: str) -> str:
    return words if isinstance(words, Markdown) else _WITHIN.sub(r"\\\1", visible(words))
