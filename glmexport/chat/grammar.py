"""GLM's grammar of reasoning and tool calls, read as text arrives: the same events, however the text is split.

An answer is ``<think>reasoning</think>content``, and calls stand in either. One reader knows both, since a call inside
of reasoning is a call all the same. A call is told once it is closed and follows the grammar, as the strict parser of
the validation reads it; until then it may yet turn out to be none, and then its text comes as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmexport.chat.tool_calls import Call, parse

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
_STRAY = (CALLED, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
#: Tags that may be special tokens of a vocabulary and yet have to be seen here.
TAGS = frozenset({THINK, THOUGHT, CALL, *_STRAY})


@dataclass(frozen=True)
class Reasoning:
    """The text between ``<think>`` and ``</think>``."""

    text: str


@dataclass(frozen=True)
class Content:
    """The text of the answer itself."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """The beginning of the call ``index``, from 0, of the tool ``name``."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A further part of the call's arguments; all parts together are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """The end of a call. ``repaired``: the call did not follow the grammar as it stood."""

    index: int
    repaired: bool = False


@dataclass(frozen=True)
class CallFault:
    """A fault of a call, as a sentence. Text that is no call because of it has come as ``Content``."""

    reason: str


Event = Reasoning | Content | CallBegin | CallArguments | CallEnd | CallFault


class Grammar:
    """An incremental reader of one answer.

    Args:
        tools: what may be called, in OpenAI's form; None: tags of calls are text.
        thinking: whether the prompt has opened ``<think>`` already; None: ``<think>`` is text.
        lenient: take a call for one whose form can be repaired, if it then follows the schema of a declared tool.
    """

    def __init__(
        self, tools: Sequence[Mapping[str, Any]] | None, thinking: bool | None, *, lenient: bool = False
    ) -> None:
        self._tools = tools
        self._lenient = lenient
        self._reasons = thinking is not None
        self._thinking = bool(thinking)
        #: Whether nothing but white space has come, in front of which ``<think>`` may stand.
        self._opening = not thinking
        #: Whether white space is to be left out, as it is behind a tag.
        self._after_tag = bool(thinking)
        self._calls = 0
        #: Text that is not handed out yet: what may be the beginning of a tag, or a call so far.
        self._held = ""
        self._in_call = False

    def feed(self, text: str) -> list[Event]:
        """Read more ``text``, and return the events that became certain."""
        self._held += text
        return list(_merged(self._read(last=False)))

    def finish(self, *, cut: bool = False) -> list[Event]:
        """End the answer, and return the remaining events.

        ``cut``: it ends where the model did not end it, so that a call which is not closed may lack anything.
        """
        self._lenient &= not cut
        return list(_merged(self._read(last=True)))

    def _read(self, *, last: bool) -> Iterator[Event]:
        while self._held:
            if self._in_call:
                size = self._call_size()
                if size is None and not last:
                    return
                segment = self._take(len(self._held) if size is None else size)
                self._in_call = False
                yield from self._call(segment)
                continue
            found = self._tag()
            if found is None:
                certain = len(self._held) if last else len(self._held) - self._possible()
                yield from self._text(self._take(certain))
                return
            at, tag = found
            yield from self._text(self._take(at), tag)
            yield from self._on_tag(tag)

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _tags(self) -> Iterator[str]:
        """Return the tags that mean something at the present place of the text."""
        if self._reasons and self._thinking:
            yield THOUGHT
        elif self._reasons and self._opening:
            yield THINK
        if self._tools is not None:
            yield CALL
            yield from _STRAY

    def _tag(self) -> tuple[int, str] | None:
        """Place and name of the first tag of what is held."""
        found = [(at, tag) for tag in self._tags() if (at := self._held.find(tag)) >= 0]
        if not found:
            return None
        at, tag = min(found)
        if tag == THINK and self._held[:at].strip():
            # Text stands in front of it, so that it is text, too.
            self._opening = False
            return self._tag()
        return at, tag

    def _possible(self) -> int:
        """Characters at the end of what is held that a tag may begin with, or that a tag decides about."""
        longest = 0
        for tag in self._tags():
            for size in range(min(len(tag) - 1, len(self._held)), longest, -1):
                if self._held.endswith(tag[:size]):
                    longest = size
                    break
        text = self._held[: len(self._held) - longest]
        # White space in front of <think> or of a call at the very beginning is no content.
        return longest if text.strip() or not self._opening else len(self._held)

    def _text(self, text: str, tag: str | None = None) -> Iterator[Event]:
        """Text in front of a ``tag``, or of nothing yet."""
        if self._after_tag or (self._opening and tag in (THINK, CALL) and not text.strip()):
            text = text.lstrip()
        if not text:
            return
        self._after_tag = self._opening = False
        yield Reasoning(text) if self._thinking else Content(text)

    def _on_tag(self, tag: str) -> Iterator[Event]:
        if tag == CALL:
            self._in_call, self._opening = True, False
            return
        self._take(len(tag))
        if tag in (THINK, THOUGHT):
            self._thinking, self._opening, self._after_tag = tag == THINK, False, True
            return
        yield CallFault(f"{tag} stands outside of a call.")
        yield from self._text(tag)

    def _call_size(self) -> int | None:
        """Characters of the call that what is held begins with; None while it may go on."""
        end, again = self._held.find(CALLED), self._held.find(CALL, len(CALL))
        ends = [end + len(CALLED)] * (end >= 0) + [again] * (again >= 0)
        return min(ends) if ends else None

    def _call(self, segment: str) -> Iterator[Event]:
        """A call, or the text that should have been one."""
        read, repaired = parse(segment, self._tools), False
        if not read.calls and self._lenient and (mended := repair(segment)) is not None:
            read, repaired = parse(mended, self._tools), True
        # What had to be repaired is called only if nothing else is wrong with it.
        if not read.calls or (repaired and read.faults):
            yield CallFault(parse(segment, self._tools).faults[0].reason)
            yield from self._text(segment)
            return
        (call,) = read.calls
        yield CallBegin(self._calls, call.name)
        yield CallArguments(self._calls, arguments_of(call))
        for fault in read.faults:
            yield CallFault(fault.reason)
        yield CallEnd(self._calls, repaired)
        self._calls += 1
        self._after_tag = True


def arguments_of(call: Call) -> str:
    """Return a call's arguments as JSON."""
    return json.dumps({argument.key: argument.value for argument in call.arguments}, ensure_ascii=False)


def _merged(events: Iterator[Event]) -> Iterator[Event]:
    """Pieces of text that follow on each other as one."""
    held: Reasoning | Content | None = None
    for event in events:
        if isinstance(event, (Reasoning, Content)):
            if held is not None and type(held) is type(event):
                held = type(event)(held.text + event.text)
                continue
            if held is not None:
                yield held
            held = event
            continue
        if held is not None:
            yield held
            held = None
        yield event
    if held is not None:
        yield held


def repair(segment: str) -> str | None:
    """Return the call that was meant by a broken one, by the strict grammar; None where that would be guessing.

    Ends that are missing are put in: of the call, of a value in front of the next key or of the call's end, of a key
    in front of its value. A call written as a JSON object with name and arguments is written out.
    """
    body = segment.removeprefix(CALL)
    body = body.removesuffix(CALLED)
    if (written := _from_json(body.strip())) is not None:
        return written
    body = re.sub(r"<arg_key>([^<]*?)\s*(?=<arg_value>)", r"<arg_key>\1</arg_key>", body)
    parts = re.split(r"(?=<arg_key>)", body)
    closed = [
        part if "<arg_value>" not in part or "</arg_value>" in part else part.removesuffix("\n") + "</arg_value>"
        for part in parts
    ]
    return f"{CALL}{''.join(closed)}{CALLED}"


def _from_json(body: str) -> str | None:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict) or set(given) != {"name", "arguments"} or not isinstance(given["arguments"], dict):
        return None
    pairs = "".join(
        f"<arg_key>{key}</arg_key><arg_value>{value if isinstance(value, str) else json.dumps(value)}</arg_value>"
        for key, value in given["arguments"].items()
    )
    return f"{CALL}{given['name']}{pairs}{CALLED}"
