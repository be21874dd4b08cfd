"""Bounds of a JSON schema of a request; whether it is too complex all the same, its process finds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from glmexport.serving.failure import Refused

#: Characters of the schema as JSON, and of a pattern in it.
CHARACTERS, PATTERN_CHARACTERS = 131_072, 2_048
#: Values in a schema, branches of one list, and the most that a count may say: of items, characters, properties.
VALUES, BRANCHES, COUNT = 20_000, 1_000, 100_000
#: Repetitions that a pattern may count.
REPETITIONS = 1_000
#: Bounds of divisors.
DIVISORS = (1e-9, 1e9)

_COUNTS = frozenset(
    f"{bound}{what}" for bound in ("min", "max") for what in ("Items", "Length", "Properties", "Contains")
)
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
#: Keywords whose values are data, in which keys mean nothing.
_DATA = frozenset({"const", "default", "enum", "examples"})
_REPEATED = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def check_schema(schema: Mapping[str, Any], param: str) -> None:
    """Refuse what is too large, before anything is made of it.

    Raises:
        Refused: for ``param``, with what is too large and what may be.
    """
    if len(json.dumps(schema, ensure_ascii=False)) > CHARACTERS:
        raise Refused(400, f"A schema has at most {CHARACTERS} characters.", param)
    for count, (key, value) in enumerate(_values(schema)):
        if count >= VALUES:
            raise Refused(400, f"A schema has at most {VALUES} values.", param)
        for reason in _excess(key, value):
            raise Refused(400, f"The schema's {reason}.", param)


def _excess(key: str, value: object) -> Iterator[str]:
    """Return what is too large about one value of a schema."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if key in _COUNTS and value > COUNT:
            yield f"{key} is at most {COUNT}"
        if key == "multipleOf" and not DIVISORS[0] <= value <= DIVISORS[1]:
            yield f"multipleOf is {DIVISORS[0]:g} to {DIVISORS[1]:g}"
    if key in _LISTS and isinstance(value, list) and len(value) > BRANCHES:
        yield f"{key} has at most {BRANCHES} branches"
    patterns = [value] if key == "pattern" else value if key == "patternProperties" else ()
    for pattern in patterns if isinstance(patterns, (list, tuple, dict)) else ():
        if not isinstance(pattern, str):
            continue
        if len(pattern) > PATTERN_CHARACTERS:
            yield f"{key} has at most {PATTERN_CHARACTERS} characters"
        counted = [number for pair in _REPEATED.findall(pattern) for number in pair if number]
        if any(len(number) > len(str(REPETITIONS)) or int(number) > REPETITIONS for number in counted):
            yield f"{key} counts at most {REPETITIONS} repetitions"


def _values(schema: object) -> Iterator[tuple[str, object]]:
    """Every value of a schema with its key, without recursion; those of a list have its key."""
    waiting: list[tuple[str, object]] = [("", schema)]
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if isinstance(value, Mapping):
            waiting += [(key if key in _DATA else name, item) for name, item in value.items()]
        elif isinstance(value, list):
            waiting += [(key if key in _DATA else "", item) for item in value]
