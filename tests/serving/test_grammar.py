"""Reasoning and tool calls: the same events however the text is split, and the calls of the strict parser."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glmexport.chat.grammar import (
    CallArguments,
    CallBegin,
    CallEnd,
    CallFault,
    Content,
    Event,
    Grammar,
    Reasoning,
    arguments_of,
)
from glmexport.chat.tool_calls import parse

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "where": {"type": "object"},
                    "exact": {"type": ["boolean", "null"]},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
CITY = "<arg_key>city</arg_key><arg_value>Bern</arg_value>"
PIECES = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "get_weather", "now", "city", "days", "3", '"3"', '{"a": [1, "</think>"]}', "true", "null", "NaN", "\n", " ", "x",
    "<", ">", "</", "<tool", "_call>", "<th", "ink>", "é你", CITY, f"<tool_call>get_weather{CITY}</tool_call>",
    "<tool_call>now</tool_call>", "<tool_call>now\n</tool_call>", '{"name": "now", "arguments": {}}',
)  # fmt: skip


def merged(events: Sequence[Event]) -> list[Event]:
    """Neighbours of one kind of text as one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, (Content, Reasoning)) and type(last) is type(event):
            found[-1] = type(event)(last.text + event.text)
        else:
            found.append(event)
    return found


def read(parts: Sequence[str], thinking: bool | None = False, lenient: bool = False, tools: Any = TOOLS) -> list[Event]:
    grammar = Grammar(tools, thinking, lenient=lenient)
    events = [event for part in parts for event in grammar.feed(part)]
    return merged([*events, *grammar.finish()])


def called(events: Sequence[Event]) -> list[tuple[str, Any]]:
    """Names and arguments; every call begins, has arguments and ends, by its index."""
    names = [event.name for event in events if isinstance(event, CallBegin)]
    for kind in (CallBegin, CallArguments, CallEnd):
        assert [event.index for event in events if isinstance(event, kind)] == list(range(len(names)))
    texts = [event.text for event in events if isinstance(event, CallArguments)]
    return list(zip(names, map(json.loads, texts), strict=True))


def text_of(events: Sequence[Event], kind: type[Content] | type[Reasoning]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join) | st.text("<>/think_oolcarguev \n", max_size=40)


@given(
    text=texts, cuts=st.lists(st.integers(0, 200)), thinking=st.sampled_from([None, False, True]), lenient=st.booleans()
)
@example(text="\n<think>a</think>b", cuts=[1, 2, 9], thinking=False, lenient=False)
@example(text="\nWell:<tool_call>", cuts=[6], thinking=False, lenient=False)
@example(text=" </tool_call><think>", cuts=[1], thinking=False, lenient=False)
def test_however_it_is_split(text: str, cuts: list[int], thinking: bool | None, lenient: bool) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[start:end] for start, end in pairwise(places)]
    whole = read([text], thinking, lenient)
    assert read(parts, thinking, lenient) == whole
    assert read(list(text), thinking, lenient) == whole


@given(text=texts, thinking=st.sampled_from([None, False, True]))
def test_calls_and_faults_are_those_of_the_strict_parser(text: str, thinking: bool | None) -> None:
    events, strict = read([text], thinking), parse(text, TOOLS)
    assert called(events) == [(call.name, json.loads(arguments_of(call))) for call in strict.calls]
    assert [event.reason for event in events if isinstance(event, CallFault)] == [
        fault.reason for fault in strict.faults
    ]


@given(text=texts)
def test_without_tools_and_reasoning_text_is_text(text: str) -> None:
    assert read(list(text), None, tools=None) == ([Content(text)] if text else [])


@given(text=texts, thinking=st.booleans())
def test_nothing_is_lost_but_calls_tags_and_white_space(text: str, thinking: bool) -> None:
    events = read([text], thinking)
    if called(events):
        return
    told, sent = (Counter("".join(part.split())) for part in (_told(events), text))
    tags = [Counter(), Counter("<think>"), Counter("</think>"), Counter("<think></think>")]
    assert not told - sent and sent - told in tags


def _told(events: Sequence[Event]) -> str:
    return text_of(events, Reasoning) + text_of(events, Content)


def test_reasoning_then_content() -> None:
    assert read(["\n<think>\nHm.</think>\n\nYes. "]) == [Reasoning("Hm."), Content("Yes. ")]
    assert read(["Hm.\n</think>\nYes."], thinking=True) == [Reasoning("Hm.\n"), Content("Yes.")]


def test_reasoning_that_never_ends_is_reasoning() -> None:
    assert read(["<think>Hm, <think> is a tag"]) == [Reasoning("Hm, <think> is a tag")]


def test_a_tag_in_the_middle_of_content_is_text() -> None:
    assert read(["Write <think> first, </think> last."]) == [Content("Write <think> first, </think> last.")]


def test_a_call_inside_of_reasoning_is_a_call() -> None:
    events = read([f"<think>a<tool_call>get_weather{CITY}</tool_call>b</think>c"])
    assert called(events) == [("get_weather", {"city": "Bern"})]
    assert (text_of(events, Reasoning), text_of(events, Content)) == ("ab", "c")


def test_white_space_around_calls_is_no_content() -> None:
    events = read(["\n<tool_call>now</tool_call>\n<tool_call>now</tool_call>\n"])
    assert called(events) == [("now", {}), ("now", {})] and not text_of(events, Content)


@pytest.mark.parametrize(
    "form", ["<tool_call>now</tool_call>", "<tool_call>now\n</tool_call>", "<tool_call>\nnow</tool_call>"]
)
def test_a_call_without_arguments(form: str) -> None:
    assert called(read(list(form))) == [("now", {})]


def test_values_by_the_schema_of_the_tool() -> None:
    values = {"city": '{"not": "decoded"} </think> <tool', "days": "3", "where": '{"a": "<b>"}', "exact": "null"}
    pairs = "".join(f"\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>" for key, value in values.items())
    events = read(list(f"<tool_call>get_weather{pairs}\n</tool_call>"))
    wanted = {"city": values["city"], "days": 3, "where": {"a": "<b>"}, "exact": None}
    assert called(events) == [("get_weather", wanted)]
    assert not any(isinstance(event, CallFault) for event in events)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("<tool_call>get_weather<arg_key>city<arg_value>Bern</arg_value></tool_call>", "not closed"),
        ("<tool_call>get_weather<arg_key>city</arg_key><arg_value>Bern</tool_call>", "not closed"),
        (f"<tool_call>get_weather{CITY}", "A call is not closed"),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call>', "white space"),
    ],
)  # fmt: skip
def test_a_broken_call_is_text_or_repaired(broken: str, reason: str) -> None:
    strict = read(list(broken))
    assert strict[0] == CallFault(strict[0].reason) and reason in strict[0].reason
    assert strict[1:] == [Content(broken)]
    lenient = read(list(broken), lenient=True)
    assert called(lenient) == [("get_weather", {"city": "Bern"})]
    assert CallEnd(0, repaired=True) in lenient


@pytest.mark.parametrize("end", range(23, 22 + len(CITY) + len("</tool_call>")))
def test_a_call_that_was_cut_is_no_call(end: int) -> None:
    """Wherever it was: what is missing is not form."""
    text = f"<tool_call>get_weather{CITY}</tool_call>"[:end]
    for lenient in (False, True):
        grammar = Grammar(TOOLS, False, lenient=lenient)
        events = merged([*grammar.feed(text), *grammar.finish(cut=True)])
        assert not called(events) and text_of(events, Content) == text


@pytest.mark.parametrize(
    "broken",
    [
        "<tool_call>get_wether<arg_key>city<arg_value>Bern</arg_value></tool_call>",
        "<tool_call>get_weather<arg_key>days<arg_value>3</arg_value></tool_call>",
        f"<tool_call>get_weather{CITY}<arg_key>days<arg_value>three</arg_value></tool_call>",
        f"<tool_call>get_weather{CITY}<arg_key>town<arg_value>x</arg_value></tool_call>",
        '<tool_call>{"name": "remove", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>',
    ],
)
def test_what_is_repaired_is_a_call_of_a_tool_as_declared(broken: str) -> None:
    events = read([broken], lenient=True)
    assert not called(events) and text_of(events, Content) == broken


def test_values_stay_as_they_are_where_a_call_is_repaired() -> None:
    events = read(["<tool_call>get_weather<arg_key>city<arg_value> Bern\n\n\n</tool_call>"], lenient=True)
    assert called(events) == [("get_weather", {"city": " Bern\n\n"})]


def test_what_cannot_be_repaired_is_text_too() -> None:
    for hopeless in ("<tool_call></tool_call>", "<tool_call>a b</tool_call>", "<tool_call>", "</arg_value>"):
        assert text_of(read([hopeless], lenient=True), Content) == hopeless


def test_an_unclosed_call_ends_where_the_next_begins() -> None:
    events = read([f"<tool_call>get_weather<tool_call>get_weather{CITY}</tool_call>"])
    assert events[:2] == [CallFault("A call is not closed."), Content("<tool_call>get_weather")]
    assert called(events) == [("get_weather", {"city": "Bern"})]


def test_a_call_is_told_as_soon_as_it_is_closed() -> None:
    grammar = Grammar(TOOLS, False)
    assert grammar.feed("Well: <tool") == [Content("Well: ")]
    assert grammar.feed("_call>now</tool_call") == []
    assert grammar.feed(">") == [CallBegin(0, "now"), CallArguments(0, "{}"), CallEnd(0)]
