"""GitHub's Markdown from text that is not ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from glmexport.untrusted import visible

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&:@])")


def foreign(words: str) -> str:
    """Text that is not ours, on one line and without any meaning to Markdown."""
    return _SPECIAL.sub(r"\\\1", visible(words))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already, each row as long as ``head``."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
