"""Names of tools, as GLM's grammar of calls can carry them."""

from __future__ import annotations

import unicodedata

_LONGEST = 256
_MARKS = frozenset("_-.:/")

#: What a name may be, as it is told to clients.
TOOL_NAME = f"A tool's name is 1 to {_LONGEST} letters, digits and characters of {''.join(sorted(_MARKS))}"


def is_tool_name(name: object) -> bool:
    """Whether a name is a text that stands in a call as it is: without white space, tags, or what controls a screen.

    Letters, digits and the marks on them are those of any script.
    """
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST:
        return False
    return all(character in _MARKS or unicodedata.category(character)[0] in "LMN" for character in name)
