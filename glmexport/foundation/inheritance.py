"""Definitions that extend another: a TOML file that states only what differs from a shipped one or a neighbour.

Tables merge key by key; numbers, texts and arrays replace what they stand for; no key can be taken away. What a file
says of itself alone (``OWN``) is never inherited: a summary names one definition, and evidence belongs to the hardware
that gave it. A definition that is extended does not extend another itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmexport.foundation.definition import load_toml, locate
from glmexport.foundation.errors import DefinitionError

#: The key at the top of a file that names what it extends.
EXTENDS = "extends"
#: Keys and tables at the top of a file that no other inherits.
OWN = frozenset({"summary", "provenance", "evidence"})


@dataclass(frozen=True)
class DefinitionSource:
    """The file of a definition and the one that it extends, both as parsed."""

    path: Path
    #: Keys that ``path`` states, without ``extends``.
    stated: dict[str, Any]
    #: The definition that is extended, as ``path`` names it and as a file; None where nothing is.
    base: str | None = None
    base_path: Path | None = None
    #: Keys that the base states; empty without one.
    base_stated: dict[str, Any] | None = None

    @property
    def resolved(self) -> dict[str, Any]:
        """The whole table: what is stated here, over what is inherited."""
        inheritable = {key: value for key, value in (self.base_stated or {}).items() if key not in OWN}
        return _merged(inheritable, self.stated)

    @property
    def inherited(self) -> tuple[str, ...]:
        """Dotted keys, as ``graph.opset``, whose values are the base's."""
        stated = set(_keys(self.stated))
        return tuple(key for key in _keys(self.resolved) if key not in stated)

    def __str__(self) -> str:
        """Return the path, and that of the base, for messages."""
        return f"{self.path} (which extends {self.base_path})" if self.base_path else str(self.path)


def open_source(kind: str, folder: str, name_or_path: str) -> DefinitionSource:
    """Read the shipped definition of that name, or that ``.toml`` file, and what it extends.

    ``kind`` is for messages, ``folder`` holds the shipped definitions (for example ``targets``).

    Raises:
        DefinitionError: either does not exist or is not TOML; what is extended lies outside the file's folder, or
            extends another; names both files.
    """
    path = locate(kind, folder, name_or_path)
    stated = load_toml(path)
    if EXTENDS not in stated:
        return DefinitionSource(path, stated)
    base = stated.pop(EXTENDS)
    if not isinstance(base, str):
        raise DefinitionError(
            f"{path}: {EXTENDS}: Input should be a valid string.",
            next_step=f"Name a shipped {kind}, or a .toml file in the same folder.",
        )
    try:
        base_path = locate(kind, folder, base if not base.endswith(".toml") else str(_neighbour(kind, path, base)))
        base_stated = load_toml(base_path)
    except DefinitionError as error:
        raise DefinitionError(f"{path} extends {base!r}. {error.message}", next_step=error.next_step) from error
    if EXTENDS in base_stated:
        raise DefinitionError(
            f"{path} extends {base_path}, which itself extends {base_stated[EXTENDS]!r}.",
            next_step=f"Extend a {kind} that extends no other.",
        )
    return DefinitionSource(path, stated, base, base_path, base_stated)


def _neighbour(kind: str, path: Path, base: str) -> Path:
    """Return the file that ``base`` names from the folder of ``path``, which it may not leave, by a link either."""
    folder = path.parent.resolve()
    found = folder / base
    if Path(base).is_absolute() or ".." in Path(base).parts or not found.resolve().is_relative_to(folder):
        raise DefinitionError(
            f"That file is not in the folder of {path}.",
            next_step=f"Name a shipped {kind}, or a .toml file in the same folder or below it.",
        )
    return path.parent / base


def _merged(base: dict[str, Any], stated: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` in its order, replaced and completed by ``stated``; tables that both have merge."""
    merged = dict(base)
    for key, value in stated.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _keys(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every value that is no table."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
