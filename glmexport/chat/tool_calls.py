"""A strict parser of GLM's grammar of tool calls: the calls of a text, and everything that is wrong with it.

As the chat templates of GLM-4.5 and 4.6 write a call::

    <tool_call>NAME
    <arg_key>KEY</arg_key>
    <arg_value>VALUE</arg_value>
    </tool_call>

and those of GLM-4.7 and 5, which leave the line breaks out. A value that is a string stands there as it is, any other
as JSON. The tags are tokens of their own in these vocabularies, so one of them in a name, key or value is a fault.
GLM-4-0414 has another grammar, which is not read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from glmexport.chat.schema import Parameters

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_KEY, _KEY_END = "<arg_key>", "</arg_key>"
_VALUE, _VALUE_END = "<arg_value>", "</arg_value>"
#: Every tag of the grammar.
TAG = re.compile("|".join((_OPEN, _CLOSE, _KEY, _KEY_END, _VALUE, _VALUE_END)))


class _Tag(NamedTuple):
    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Argument:
    """One argument: ``raw`` as it is written, ``value`` as the tool takes it.

    ``value`` is ``raw`` where the tool's schema says string or nothing, and where ``raw`` is of none of its types
    (``chat.schema``).
    """

    key: str
    raw: str
    value: Any


@dataclass(frozen=True)
class Call:
    """A call that follows the grammar, with its arguments in order; ``offset`` is that of its first character."""

    name: str
    arguments: tuple[Argument, ...]
    offset: int


@dataclass(frozen=True)
class Fault:
    """A fault, as a sentence, at the character ``offset``."""

    offset: int
    reason: str


@dataclass(frozen=True)
class Parsed:
    """The calls that follow the grammar, the text outside of calls, and the faults by offset.

    A call with a fault of grammar is not among ``calls``. One that gives a key twice is, with the first value; so is
    one whose name or arguments are not the tools'.
    """

    calls: tuple[Call, ...]
    text: str
    faults: tuple[Fault, ...]


def parse(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> Parsed:
    """Read every call of ``text``; in time proportional to its length, and without raising on any text.

    Args:
        text: what was generated. Reasoning is text like any other.
        tools: the tools' declarations in OpenAI's form (``{"type": "function", "function": {...}}``, or what is in
            it). With them names, missing and unknown arguments and the types of values are checked too.
    """
    tags = [_Tag(match.group(), match.start(), match.end()) for match in TAG.finditer(text)]
    schemas = None if tools is None else _schemas(tools)
    calls: list[Call] = []
    outside: list[str] = []
    faults: list[Fault] = []
    index, last = 0, 0
    while index < len(tags):
        tag = tags[index]
        outside.append(text[last : tag.start])
        stop = index + 1
        try:
            if tag.name != _OPEN:
                raise _Broken(tag.start, f"{tag.name} stands outside of a call.")
            while stop < len(tags) and tags[stop].name not in (_OPEN, _CLOSE):
                stop += 1
            if stop == len(tags) or tags[stop].name == _OPEN:
                raise _Broken(tag.start, "A call is not closed.")
            stop += 1
            call, wrong = _call(text, tags[index:stop])
        except _Broken as broken:
            faults.append(broken.fault)
        else:
            if schemas is not None:
                call, unfit = _checked(call, schemas)
                wrong += unfit
            calls.append(call)
            faults += wrong
        unclosed = tag.name == _OPEN and tags[stop - 1].name != _CLOSE
        last = tags[stop - 1].end if not unclosed else tags[stop].start if stop < len(tags) else len(text)
        index = stop
    outside.append(text[last:])
    return Parsed(tuple(calls), "".join(outside), tuple(sorted(faults, key=lambda fault: fault.offset)))


class _Broken(Exception):
    """The grammar is not followed; ``fault`` says where."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.fault = Fault(offset, reason)


def _call(text: str, tags: Sequence[_Tag]) -> tuple[Call, list[Fault]]:
    """The call between the first and the last of ``tags``, and the keys that it gives twice.

    Raises:
        _Broken: it is none; with its first fault.
    """
    inner = tags[1:-1]
    name = _name(text[tags[0].end : tags[1].start].strip(), tags[0].start)
    arguments: dict[str, Argument] = {}
    repeated = []
    for position in range(0, len(inner), 4):
        argument = _argument(text, inner[position : position + 4])
        following = tags[position + 5].start if position + 4 <= len(inner) else tags[-1].start
        _blank(text, inner[position + 3].end, following)
        if argument.key in arguments:
            repeated.append(Fault(inner[position].start, f"The key {_short(argument.key)} is given twice."))
        arguments.setdefault(argument.key, argument)
    return Call(name, tuple(arguments.values()), tags[0].start), repeated


def _name(name: str, offset: int) -> str:
    if not name:
        raise _Broken(offset, "A call has no name.")
    if any(character.isspace() for character in name):
        raise _Broken(offset, f"The name {_short(name)} of a call has white space in it.")
    return name


def _argument(text: str, tags: Sequence[_Tag]) -> Argument:
    """The argument whose four tags these should be."""
    names = [tag.name for tag in tags]
    if names[0] != _KEY:
        raise _Broken(tags[0].start, f"{names[0]} stands where an argument should begin.")
    if names[1:2] != [_KEY_END]:
        raise _Broken(tags[0].start, "A key is not closed.")
    key = text[tags[0].end : tags[1].start]
    if not key.strip():
        raise _Broken(tags[0].start, "A key is empty.")
    if names[2:3] != [_VALUE]:
        raise _Broken(tags[0].start, f"The key {_short(key)} has no value.")
    if names[3:4] != [_VALUE_END]:
        raise _Broken(tags[2].start, f"The value of {_short(key)} is not closed.")
    _blank(text, tags[1].end, tags[2].start)
    raw = text[tags[2].end : tags[3].start]
    return Argument(key, raw, raw)


def _blank(text: str, start: int, stop: int) -> None:
    between = text[start:stop].strip()
    if between:
        raise _Broken(start, f"{_short(between)} stands between the tags of a call.")


def _checked(call: Call, schemas: Mapping[str, Parameters]) -> tuple[Call, list[Fault]]:
    """The call with its values decoded, and where it is not what the tools take."""
    if call.name not in schemas:
        return call, [Fault(call.offset, f"There is no tool {_short(call.name)}.")]
    parameters = schemas[call.name]
    given = {argument.key for argument in call.arguments}
    faults = [
        Fault(call.offset, f"{call.name} needs the argument {_short(key)}.")
        for key in sorted(parameters.required - given)
    ]
    arguments = []
    for argument in call.arguments:
        value = argument.raw
        if argument.key in parameters.properties or parameters.others is not False:
            value, wrong = parameters.value(argument.key, argument.raw)
            if wrong:
                faults.append(Fault(call.offset, f"{call.name}: {_short(argument.key)} {wrong}."))
        else:
            faults.append(Fault(call.offset, f"{call.name} has no argument {_short(argument.key)}."))
        arguments.append(Argument(argument.key, argument.raw, value))
    return Call(call.name, tuple(arguments), call.offset), faults


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Parameters]:
    """Parameters of every tool, by name."""
    functions = [_table(tool.get("function", tool)) for tool in tools]
    return {str(function.get("name")): Parameters(_table(function.get("parameters"))) for function in functions}


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
