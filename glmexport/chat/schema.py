"""Arguments of calls, read by the tool's schema. GLM writes strings as they are and all else as JSON.

The schema tells them apart, as clients write schemas: types and lists of them, enum, const, anyOf, oneOf, allOf, $ref,
and what is nested.

Read are the keywords that say of which kind a value is, and what is in it. Bounds, patterns and formats are the tool's
own to check. A text that can be read both ways is what it is in JSON: ``3`` for a number or a string is a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

Kinds = frozenset[str]
ALL: Kinds = frozenset({"string", "integer", "number", "boolean", "object", "array", "null"})
#: Types that are meant by keywords about values of one kind, where no type is said; a string is allowed all the same.
_IMPLIED: Mapping[str, str] = {
    "properties": "object", "required": "object", "additionalProperties": "object", "items": "array",
    "prefixItems": "array", "minimum": "number", "maximum": "number", "exclusiveMinimum": "number",
    "exclusiveMaximum": "number", "multipleOf": "number",
}  # fmt: skip
#: Parts of a schema that are looked at for one call, which takes 0.1 s. What is not looked at by then fits everything.
_STEPS = 50_000
#: Levels of a value that are looked at, and references that are followed in a row.
_DEPTH = 64


class Parameters:
    """The parameters of a tool, to read one call by.

    Several forms are read as one that has the arguments of all, and requires what all of them require.

    Attributes:
        properties: schemas of arguments by name.
        required: names of those that a call needs.
        others: the schema of arguments that are not among ``properties``; False: there are none.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._root = schema
        self._left = _STEPS
        properties, self.required, others = self._members(schema, 0)
        self.properties: Mapping[str, Any] = properties or {}
        # As OpenAI's strict schemas have it, and others mean it: what is declared is all there is.
        self.others: Any = True if properties is None else False if others is None else others

    def value(self, key: str, raw: str) -> tuple[Any, str]:
        """Return the value that ``raw`` stands for as the argument ``key``, and what is wrong with it, if anything.

        What is wrong is told as the end of a sentence; the value is then ``raw``, or of the kind that was meant.
        """
        schema = self.properties.get(key, self.others)
        kinds = self._kinds(schema, 0)
        if kinds is None:
            return raw, ""
        value, known = _from_json(raw)
        decoded = known and not isinstance(value, str) and not _kinds_of(value).isdisjoint(kinds)
        if decoded and self._fits(value, schema, 0):
            return value, ""
        if "string" in kinds and self._fits(raw, schema, 0):
            return raw, ""
        shown = repr(raw if len(raw) <= 40 else f"{raw[:40]}…")
        if not decoded and "string" not in kinds:
            return raw, f"is {shown}, not of type {_named(schema, kinds)}"
        listed = isinstance(schema, Mapping) and {"enum", "const"} & {*schema}
        return value if decoded else raw, f"is {shown}, which is none of its {'values' if listed else 'forms'}"

    def _spent(self, steps: int) -> bool:
        """Whether no more is to be looked at."""
        self._left -= steps
        return self._left < 0

    def _kinds(self, schema: object, depth: int) -> Kinds | None:
        """Types that a schema may admit; None: it says nothing of them."""
        if not isinstance(schema, Mapping) or depth > _DEPTH or self._spent(1 + _size(schema.get("enum"))):
            return None
        said: list[Kinds] = []
        if types := _listed(schema.get("type")):
            said.append(frozenset(types))
        if isinstance(choices := schema.get("enum"), list):
            said.append(frozenset().union(*map(_kinds_of, choices)))
        if "const" in schema:
            said.append(_kinds_of(schema["const"]))
        if "$ref" in schema and (kinds := self._kinds(self._resolved(schema["$ref"]), depth + 1)) is not None:
            said.append(kinds)
        for branches in _branches(schema, "anyOf", "oneOf"):
            found = [self._kinds(branch, depth + 1) for branch in branches]
            if any(kinds is not None for kinds in found):
                said.append(frozenset().union(*(ALL if kinds is None else kinds for kinds in found)))
        for branches in _branches(schema, "allOf"):
            said += [kinds for branch in branches if (kinds := self._kinds(branch, depth + 1)) is not None]
        if not said:
            implied = {kind for keyword, kind in _IMPLIED.items() if keyword in schema}
            said = [frozenset({*implied, "string"})] if implied else []
        if not said:
            return None
        # A whole number is a number as well.
        kinds = frozenset.intersection(*(each | {"integer"} if "number" in each else each for each in said))
        return kinds | {"null"} if schema.get("nullable") is True else kinds

    def _fits(self, value: object, schema: object, depth: int) -> bool:
        """Whether a value does."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping) or depth > _DEPTH or self._spent(1 + _size(schema.get("enum"))):
            return True
        if value is None and schema.get("nullable") is True:
            return True
        types, choices = _listed(schema.get("type")), schema.get("enum")
        return (
            (not types or not _kinds_of(value).isdisjoint(types))
            and (not isinstance(choices, list) or any(_same(value, choice) for choice in choices))
            and ("const" not in schema or _same(value, schema["const"]))
            and ("$ref" not in schema or self._fits(value, self._resolved(schema["$ref"]), depth + 1))
            and all(
                any(self._fits(value, branch, depth + 1) for branch in branches)
                for branches in _branches(schema, "anyOf", "oneOf")
            )
            and all(
                self._fits(value, branch, depth + 1) for branches in _branches(schema, "allOf") for branch in branches
            )
            and (not isinstance(value, dict) or self._members_fit(value, schema, depth))
            and (not isinstance(value, list) or self._items_fit(value, schema, depth))
        )

    def _members_fit(self, value: dict[str, Any], schema: Mapping[str, Any], depth: int) -> bool:
        required, properties = schema.get("required"), schema.get("properties")
        self._spent(_size(required))
        if isinstance(required, list) and any(isinstance(key, str) and key not in value for key in required):
            return False
        known = properties if isinstance(properties, Mapping) else {}
        others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        return all(self._fits(item, known.get(key, others), depth + 1) for key, item in value.items())

    def _items_fit(self, value: list[Any], schema: Mapping[str, Any], depth: int) -> bool:
        first = schema.get("prefixItems")
        first = first if isinstance(first, list) else []
        rest = schema.get("items", True)
        schemas = [*first[: len(value)], *[rest] * (len(value) - len(first))]
        return all(self._fits(item, each, depth + 1) for item, each in zip(value, schemas, strict=True))

    def _members(self, schema: object, depth: int) -> tuple[dict[str, Any] | None, frozenset[str], Any]:
        """Properties of an object, None: it says nothing of them; what it needs; the schema of others, if said."""
        if not isinstance(schema, Mapping) or depth > _DEPTH:
            return None, frozenset(), None
        own, needed = schema.get("properties"), schema.get("required")
        if self._spent(1 + _size(own) + _size(needed)):
            return None, frozenset(), None
        properties = dict(own) if isinstance(own, Mapping) else None
        required = frozenset(key for key in needed if isinstance(key, str)) if isinstance(needed, list) else frozenset()
        others = True if "patternProperties" in schema else schema.get("additionalProperties")
        parts = [self._resolved(schema["$ref"])] if "$ref" in schema else []
        parts += [branch for branches in _branches(schema, "allOf") for branch in branches]
        for part in parts:
            more, more_required, more_others = self._members(part, depth + 1)
            self._spent(_size(more))
            properties = properties if more is None else {**more, **(properties or {})}
            required |= more_required
            others = more_others if others is None else others
        for branches in _branches(schema, "anyOf", "oneOf"):
            found = [self._members(branch, depth + 1) for branch in branches]
            for key, item in ((key, item) for more, _, _ in found for key, item in (more or {}).items()):
                self._spent(1)
                properties = properties or {}
                known = properties.get(key)
                properties[key] = item if known is None or known is item else {"anyOf": [known, item]}
            required |= frozenset.intersection(*(more_required for _, more_required, _ in found))
            others = True if others is None and any(each[2] for each in found) else others
        return properties, required, others

    def _resolved(self, reference: object) -> object:
        """Return the schema that a reference within it points to; True, which admits all, if there is none."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return True
        found: Any = self._root
        for part in reference[1:].split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name[:9]) < len(found):
                found = found[int(name[:9])]
            else:
                return True
        return found


def _named(schema: object, kinds: Kinds) -> str:
    """The types, in the schema's order where it lists them."""
    declared = schema.get("type") if isinstance(schema, Mapping) else None
    return " or ".join(_listed(declared) or sorted(kinds))


def _from_json(raw: str) -> tuple[Any, bool]:
    """The value of a JSON text, and whether it is one. 1e999 is JSON, and no number that a tool could take."""
    try:
        return json.loads(raw, parse_constant=_refuse, parse_float=_finite), True
    except (ValueError, RecursionError):
        return None, False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is too large")
    return value


def _kinds_of(value: object) -> Kinds:
    """Types of JSON Schema that a value is of; 1.0 is an integer, too."""
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, (int, float)):
        return frozenset({"number", "integer"} if math.isfinite(value) and value == int(value) else {"number"})
    return frozenset({{dict: "object", list: "array", str: "string", type(None): "null"}[type(value)]})


def _listed(types: object) -> list[str]:
    given = [types] if isinstance(types, str) else types if isinstance(types, list) else []
    return [kind for kind in given if isinstance(kind, str)]


def _branches(schema: Mapping[str, Any], *keywords: str) -> Iterator[list[Any]]:
    for keyword in keywords:
        if isinstance(branches := schema.get(keyword), list) and branches:
            yield branches


def _same(one: object, other: object) -> bool:
    """Whether two values are equal in JSON, where 1 is 1.0 and not true."""
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(item, other[key]) for key, item in one.items())
    return one == other


def _size(value: object) -> int:
    return len(value) if isinstance(value, (list, Mapping)) else 0
