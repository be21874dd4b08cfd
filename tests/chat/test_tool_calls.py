"""The grammar of tool calls: by hand, back and forth, cut anywhere, and in steps proportional to the text."""

from __future__ import annotations

import json
import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmexport.chat import tool_calls as toolcalls
from glmexport.chat.tool_calls import parse

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "limits": {"type": ["array", "null"]},
                },
                "required": ["city"],
            },
        },
    }
]
LINES = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Bern, BE</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
CLOSE = LINES.replace("\n", "")


def call(*pairs: tuple[str, str], name: str = "weather") -> str:
    arguments = "".join(f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in pairs)
    return f"<tool_call>{name}{arguments}</tool_call>"


def values(text: str) -> dict[str, Any]:
    parsed = parse(text, TOOLS)
    assert not parsed.faults
    return {argument.key: argument.value for argument in parsed.calls[0].arguments}


def faults(text: str, tools: list[dict[str, Any]] | None = None) -> list[str]:
    return [fault.reason for fault in parse(text, tools).faults]


@pytest.mark.parametrize("text", [LINES, CLOSE])
def test_both_spellings(text: str) -> None:
    parsed = parse(f"Let me see.\n{text} Done.", TOOLS)
    (found,) = parsed.calls
    assert (found.name, found.offset, parsed.faults) == ("weather", 12, ())
    assert [(a.key, a.raw, a.value) for a in found.arguments] == [("city", "Bern, BE", "Bern, BE"), ("days", "3", 3)]
    assert parsed.text == "Let me see.\n Done."


def test_calls_without_arguments_and_several_of_them() -> None:
    parsed = parse("<tool_call>now</tool_call>\n<tool_call>\nthen\n</tool_call>")
    assert [(found.name, found.arguments) for found in parsed.calls] == [("now", ()), ("then", ())]
    assert parsed.text == "\n" and not parsed.faults


def test_text_without_calls() -> None:
    assert parse("a < b > c") == toolcalls.Parsed((), "a < b > c", ())
    assert parse("", TOOLS) == toolcalls.Parsed((), "", ())


def test_values_are_of_the_types_of_the_schema() -> None:
    assert values(call(("city", "3"), ("days", "3.0"))) == {"city": "3", "days": 3.0}
    assert values(call(("city", " spaces stay "), ("limits", "[1, 2]"))) == {"city": " spaces stay ", "limits": [1, 2]}
    assert values(call(("city", ""), ("limits", "null"), ("unit", "C"))) == {"city": "", "limits": None, "unit": "C"}
    # Without tools nobody says that it is a number.
    assert parse(call(("days", "3"))).calls[0].arguments[0].value == "3"


@pytest.mark.parametrize(
    ("text", "reason", "offset"),
    [
        ("<tool_call></tool_call>", "A call has no name.", 0),
        ("<tool_call>two words</tool_call>", "The name 'two words' of a call has white space in it.", 0),
        ("ab</tool_call>", "</tool_call> stands outside of a call.", 2),
        ("<arg_value>", "<arg_value> stands outside of a call.", 0),
        ("<tool_call>f", "A call is not closed.", 0),
        ("<tool_call>f</arg_key></tool_call>", "</arg_key> stands where an argument should begin.", 12),
        ("<tool_call>f<arg_key>a</tool_call>", "A key is not closed.", 12),
        ("<tool_call>f<arg_key> </arg_key></tool_call>", "A key is empty.", 12),
        ("<tool_call>f<arg_key>a</arg_key></tool_call>", "The key 'a' has no value.", 12),
        (
            "<tool_call>f<arg_key>a</arg_key><arg_value>1</tool_call>",
            "The value of 'a' is not closed.",
            len("<tool_call>f<arg_key>a</arg_key>"),
        ),
        (
            "<tool_call>f<arg_key>a</arg_key>x<arg_value>1</arg_value></tool_call>",
            "'x' stands between the tags of a call.",
            len("<tool_call>f<arg_key>a</arg_key>"),
        ),
        (
            "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value>x</tool_call>",
            "'x' stands between the tags of a call.",
            len("<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value>"),
        ),
    ],
)
def test_faults_of_grammar(text: str, reason: str, offset: int) -> None:
    parsed = parse(text)
    assert not parsed.calls
    assert [(fault.reason, fault.offset) for fault in parsed.faults] == [(reason, offset)]


def test_a_call_within_a_call_leaves_the_inner_one() -> None:
    parsed = parse("a<tool_call>outer <tool_call>inner</tool_call>b")
    assert [found.name for found in parsed.calls] == ["inner"]
    assert [(fault.reason, fault.offset) for fault in parsed.faults] == [("A call is not closed.", 1)]
    assert parsed.text == "ab"


def test_a_key_that_is_given_twice_has_its_first_value() -> None:
    parsed = parse(call(("city", "Bern"), ("city", "Basel")), TOOLS)
    assert [fault.reason for fault in parsed.faults] == ["The key 'city' is given twice."]
    assert [argument.value for argument in parsed.calls[0].arguments] == ["Bern"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (call(name="wether"), "There is no tool 'wether'."),
        (call(("days", "3")), "weather needs the argument 'city'."),
        (call(("city", "Bern"), ("town", "x")), "weather has no argument 'town'."),
        (call(("city", "Bern"), ("days", "three")), "weather: 'days' is 'three', not of type integer."),
        (call(("city", "Bern"), ("days", "3.5")), "weather: 'days' is '3.5', not of type integer."),
        (call(("city", "Bern"), ("days", "true")), "weather: 'days' is 'true', not of type integer."),
        (call(("city", "Bern"), ("days", "1e999")), "weather: 'days' is '1e999', not of type integer."),
        (call(("city", "Bern"), ("days", "NaN")), "weather: 'days' is 'NaN', not of type integer."),
        (call(("city", "Bern"), ("limits", "{}")), "weather: 'limits' is '{}', not of type array or null."),
        (call(("city", "Bern"), ("unit", "K")), "weather: 'unit' is 'K', which is none of its values."),
    ],
)
def test_faults_against_the_tools(text: str, reason: str) -> None:
    assert faults(text, TOOLS) == [reason]
    assert faults(text) == []
    assert len(parse(text, TOOLS).calls) == 1


def test_hostile_values_and_declarations() -> None:
    for raw in ("[" * 100_000, "9" * 5000):
        assert len(faults(call(("city", "Bern"), ("limits", raw)), TOOLS)) == 1
    for odd in ({}, {"function": None}, {"name": "weather", "parameters": {"properties": [1], "required": 3}}):
        parse(LINES, [odd])


TAGLESS = st.text(max_size=20).filter(lambda text: "<" not in text)
NAMES = TAGLESS.map(lambda text: "".join(text.split())).filter(bool)
KEYS = TAGLESS.filter(lambda text: bool(text.strip()))


@given(NAMES, st.lists(st.tuples(KEYS, TAGLESS), max_size=4, unique_by=lambda pair: pair[0]), st.booleans())
def test_what_is_rendered_is_read_back(name: str, pairs: list[tuple[str, str]], lines: bool) -> None:
    end = "\n" if lines else ""
    text = f"<tool_call>{name}{end}"
    for key, value in pairs:
        text += f"<arg_key>{key}</arg_key>{end}<arg_value>{value}</arg_value>{end}"
    parsed = parse(f"{text}</tool_call>")
    assert not parsed.faults and not parsed.text
    assert parsed.calls[0].name == name
    assert [(argument.key, argument.value) for argument in parsed.calls[0].arguments] == pairs


@given(st.integers() | st.booleans() | st.none() | st.lists(st.integers() | TAGLESS, max_size=3))
def test_values_of_every_type_are_read_back(value: Any) -> None:
    kinds = ["integer", "boolean", "null", "array"]
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": kinds}}}}]
    parsed = parse(call(("a", json.dumps(value)), name="f"), tools)
    assert not parsed.faults
    assert parsed.calls[0].arguments[0].value == value


PIECES = st.sampled_from([*toolcalls.TAG.pattern.split("|"), "weather", "city", " ", "\n", "3", "<", "tool_call>"])


@given(st.lists(PIECES, max_size=20).map("".join))
def test_any_text_is_read(text: str) -> None:
    """Faults are in order and inside of the text, and every character is in a call, a fault or the text outside."""
    parsed = parse(text, TOOLS)
    offsets = [fault.offset for fault in parsed.faults]
    assert offsets == sorted(offsets) and all(0 <= offset < len(text) for offset in offsets)
    assert not toolcalls.TAG.search(text) or parsed.calls or parsed.faults
    assert len(parsed.calls) + len(parsed.faults) >= text.count("<tool_call>")


def test_every_beginning_of_a_call_is_read() -> None:
    for text in (LINES, CLOSE):
        for stop in range(len(text)):
            parsed = parse(text[:stop], TOOLS)
            assert not parsed.calls
            # Cut within the first tag it is text; later, a call that is not closed.
            begun = stop >= len("<tool_call>")
            assert [fault.reason for fault in parsed.faults] == ["A call is not closed."] * begun
            assert parsed.text == ("" if begun else text[:stop])


def steps(text: str) -> int:
    """Lines of Python that reading takes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        parse(text, TOOLS)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "unit", ["<tool_call>", "</tool_call>", "<arg_key>", "<tool_call><arg_key>", "<tool_call>f</tool_call>", "<", CLOSE]
)
def test_twice_the_text_takes_twice_the_steps(unit: str) -> None:
    once, twice = steps(unit * 100), steps(unit * 200)
    assert twice <= 2 * once


def test_twice_the_arguments_take_twice_the_steps() -> None:
    once, twice = (steps(call(*((f"k{index}", "v") for index in range(count)))) for count in (100, 200))
    assert twice <= 2 * once
