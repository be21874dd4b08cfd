"""Names of tools that GLM's grammar of calls can carry."""

from __future__ import annotations

import unicodedata

_LONGEST = 256
_MARKS = frozenset("_-.:/")

#: The rule of names, as clients are told it.
TOOL_NAME = f"A tool's name is 1 to {_LONGEST} letters, digits and characters of {''.join(sorted(_MARKS))}"


def is_tool_name(name: object) -> bool:
    """Return whether a name can stand in a call as it is: without white space, tags, or what controls a screen.

    Letters, digits and the marks on them are those of any script.
    """
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST:
        return False
    return all(character in _MARKS or unicodedata.category(character)[0] in "LMN" for character in name)
