"""Looks for texts that the grammar of answers reads differently in parts than whole, or than the strict parser.

    pip install 'atheris>=3,<4'
    python tests/fuzz/fuzz_grammar.py [-max_total_time=60] [CORPUS]

What it finds belongs into tests/serving/test_grammar.py. The property tests there look in the same places, with less
patience; this one goes by what the code does with a text.
"""

from __future__ import annotations

import json
import sys

import atheris

with atheris.instrument_imports(include=["glmexport.serving", "glmexport.chat.tool_calls"]):
    from glmexport.chat.grammar import (
        CallArguments,
        CallBegin,
        CallFault,
        Content,
        Event,
        Grammar,
        Reasoning,
        arguments_of,
    )
    from glmexport.chat.tool_calls import parse

PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": ["integer", "object", "null"]}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("f", "g")]
#: Single characters that stand for what random bytes seldom are.
WORDS = {
    "\x01": "<think>", "\x02": "</think>", "\x03": "<tool_call>", "\x04": "</tool_call>", "\x05": "<arg_key>",
    "\x06": "</arg_key>", "\x07": "<arg_value>", "\x08": "</arg_value>",
}  # fmt: skip


def merged(events: list[Event]) -> list[Event]:
    """Neighbours of one kind of text as one."""
    found: list[Event] = []
    for event in events:
        if found and isinstance(event, (Content, Reasoning)) and type(found[-1]) is type(event):
            found[-1] = type(event)(found[-1].text + event.text)
        else:
            found.append(event)
    return found


def read(parts: list[str], thinking: bool | None, lenient: bool) -> list[Event]:
    """All events of a text that comes in parts."""
    grammar = Grammar(TOOLS, thinking, lenient=lenient)
    return merged([*(event for part in parts for event in grammar.feed(part)), *grammar.finish()])


def one(data: bytes) -> None:
    """One text, split at places that the data names."""
    given = atheris.FuzzedDataProvider(data)
    thinking, lenient = given.PickValueInList([None, False, True]), given.ConsumeBool()
    places = sorted(given.ConsumeIntListInRange(3, 0, 120))
    text = "".join(WORDS.get(character, character) for character in given.ConsumeUnicodeNoSurrogates(120))
    whole = read([text], thinking, lenient)
    parts = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    assert read(parts, thinking, lenient) == whole
    assert read(list(text), thinking, lenient) == whole
    if lenient:
        return
    strict = parse(text, TOOLS)
    names = [event.name for event in whole if isinstance(event, CallBegin)]
    arguments = [json.loads(event.text) for event in whole if isinstance(event, CallArguments)]
    assert names == [call.name for call in strict.calls]
    assert arguments == [json.loads(arguments_of(call)) for call in strict.calls]
    assert [event.reason for event in whole if isinstance(event, CallFault)] == [
        fault.reason for fault in strict.faults
    ]


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
