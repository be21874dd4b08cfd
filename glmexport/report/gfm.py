"""GitHub's Markdown, made from text that others wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from glmexport.foundation.untrusted import visible

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&:@])")
#: Characters that have a meaning within a line, other than the signs of numbers.
_WITHIN = re.compile(r"([\\`*_\[\]!|<>~&@]|(?<=www)\.|:(?=//))")
_DIGEST = re.compile(r"[0-9A-Za-z:]+")


class Markdown(str):
    """A text that is Markdown already; any other text is escaped."""

    __slots__ = ()


def foreign(words: str) -> Markdown:
    """Return text that others wrote on one line, escaped for Markdown."""
    return Markdown(_SPECIAL.sub(r"\\\1", visible(words)))


def code(digest: str) -> Markdown:
    """Return a digest in the font of code; anything that is no digest is returned as escaped text."""
    return Markdown(f"`{digest}`") if _DIGEST.fullmatch(digest) else foreign(digest)


def strong(words: str) -> Markdown:
    """Return the text in bold."""
    return Markdown(f"**{foreign(words)}**")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Markdown:
    """Return a table of cells, each row as long as ``head``; cells that are no ``Markdown`` are escaped."""
    lines = [map(_cell, head), ["---"] * len(head), *(map(_cell, row) for row in rows)]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _cell(words: str) -> str:
    return words if isinstance(words, Markdown) else _WITHIN.sub(r"\\\1", visible(words))
