"""Answers in OpenAI's form: whole, or as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from glmexport.chat.grammar import CallArguments, CallBegin, CallEnd, CallFault, Content, Event, Grammar, Reasoning
from glmexport.serving.answer import End
from glmexport.serving.metrics import Metrics
from glmexport.serving.text import TextPart, Token

#: The text of a token by its id.
Spelling = Callable[[int], str]


class Reply(Protocol):
    """The form of the answer to one kind of request."""

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks in front of the first part."""
        ...

    def part(self, part: TextPart) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a part."""
        ...

    def end(self, end: End) -> Iterator[dict[str, Any]]:
        """Yield the chunks behind the last part, without usage."""
        ...

    def usage_chunk(self, end: End) -> dict[str, Any]:
        """Return the chunk that has the usage."""
        ...

    def whole(self, end: End) -> dict[str, Any]:
        """Return everything in one document, once all parts and the end were given."""
        ...


@dataclass(frozen=True)
class ReplyHead:
    """The fields that every document of an answer begins with."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> ReplyHead:
        """Return the head of an answer that begins now."""
        return cls(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model)

    def document(self, kind: str, choices: list[dict[str, Any]], **more: object) -> dict[str, Any]:
        """Return one document."""
        named = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**named, "choices": choices, **more}


def usage(end: End) -> dict[str, Any]:
    """Return the tokens and times of an answer."""
    timing = end.timing
    seconds = {"queue_s": timing.queue_s, "ttft_s": timing.ttft_s, "tpot_s": timing.tpot_s}
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.tokens,
        "total_tokens": end.prompt_tokens + end.tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached},
        "timings": {name: None if value is None else round(value, 6) for name, value in seconds.items()},
    }


class ChatReply:
    """The answer to /v1/chat/completions. ``logprobs``: whether likelihoods were asked for."""

    def __init__(self, head: ReplyHead, grammar: Grammar, spell: Spelling, metrics: Metrics, *, logprobs: bool) -> None:
        self._head = head
        self._grammar = grammar
        self._spell = spell
        self._metrics = metrics
        self._logprobs = logprobs
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._likely: list[dict[str, Any]] = []

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks in front of the first part, as ``Reply`` says."""
        yield self._chunk({"role": "assistant", "content": ""})

    def part(self, part: TextPart) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a part, as ``Reply`` says."""
        likely = [self._entry(token) for token in part.tokens] if self._logprobs else []
        self._likely += likely
        deltas = self._deltas(self._grammar.feed(part.text))
        # Likelihoods go with the first chunk; a token that shows no text yet has one of its own.
        for delta in deltas or ([{}] if likely else []):
            yield self._chunk(delta, likely=likely)
            likely = []

    def end(self, end: End) -> Iterator[dict[str, Any]]:
        """Yield the chunks behind the last part, as ``Reply`` says."""
        for delta in self._deltas(self._grammar.finish(cut=end.reason == "length" or end.stopped)):
            yield self._chunk(delta)
        yield self._chunk({}, finish=self._finish(end))

    def usage_chunk(self, end: End) -> dict[str, Any]:
        """Return the chunk that has the usage, as ``Reply`` says."""
        return self._head.document("chat.completion.chunk", [], usage=usage(end))

    def whole(self, end: End) -> dict[str, Any]:
        """Return everything in one document, as ``Reply`` says."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._content), "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message |= {"tool_calls": self._calls, "content": message["content"] or None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": self._likely, "refusal": None} if self._logprobs else None,
            "finish_reason": self._finish(end),
        }
        return self._head.document("chat.completion", [choice], usage=usage(end))

    def _finish(self, end: End) -> str:
        return "tool_calls" if self._calls and end.reason == "stop" else end.reason

    def _deltas(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        return [delta for event in events if (delta := self._delta(event))]

    def _delta(self, event: Event) -> dict[str, Any] | None:
        match event:
            case Content(text):
                self._content.append(text)
                return {"content": text}
            case Reasoning(text):
                self._reasoning.append(text)
                return {"reasoning_content": text}
            case CallBegin(index, name):
                call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
                self._calls.append({**call, "function": {"name": name, "arguments": ""}})
                return {"tool_calls": [{"index": index, **call, "function": {"name": name, "arguments": ""}}]}
            case CallArguments(index, text):
                self._calls[index]["function"]["arguments"] += text
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case CallEnd(_, repaired):
                self._metrics.repairs.inc(repaired)
            case CallFault():
                self._metrics.faults.inc()
        return None

    def _chunk(
        self, delta: dict[str, Any], *, likely: list[dict[str, Any]] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        logprobs = {"content": likely, "refusal": None} if likely else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._head.document("chat.completion.chunk", [choice])

    def _entry(self, token: Token) -> dict[str, Any]:
        assert token.likely is not None
        top = [self._named(id_, logprob) for id_, logprob in token.likely.top]
        return {**self._named(token.id, token.likely.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._spell(token)
        # What is no whole character has no bytes that its text could tell.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


class TextReply:
    """The answer to /v1/completions. ``ids``: whether token ids are given as well."""

    def __init__(self, head: ReplyHead, spell: Spelling, prompt: Sequence[int], *, logprobs: bool, ids: bool) -> None:
        self._head = head
        self._spell = spell
        self._prompt = prompt
        self._logprobs = logprobs
        self._ids = ids
        self._text = ""
        self._tokens: list[Token] = []

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks in front of the first part, as ``Reply`` says."""
        yield from ()

    def part(self, part: TextPart) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a part, as ``Reply`` says."""
        at = len(self._text)
        self._text += part.text
        self._tokens += part.tokens
        yield self._head.document("text_completion", [self._choice(part.text, part.tokens, at, None)])

    def end(self, end: End) -> Iterator[dict[str, Any]]:
        """Yield the chunks behind the last part, as ``Reply`` says."""
        yield self._head.document("text_completion", [self._choice("", (), len(self._text), end.reason)])

    def usage_chunk(self, end: End) -> dict[str, Any]:
        """Return the chunk that has the usage, as ``Reply`` says."""
        return self._head.document("text_completion", [], usage=usage(end))

    def whole(self, end: End) -> dict[str, Any]:
        """Return everything in one document, as ``Reply`` says."""
        choice = self._choice(self._text, self._tokens, 0, end.reason)
        prompt = {"prompt_token_ids": list(self._prompt)} if self._ids else {}
        return self._head.document("text_completion", [choice], usage=usage(end), **prompt)

    def _choice(self, text: str, tokens: Sequence[Token], at: int, finish: str | None) -> dict[str, Any]:
        ids = {"token_ids": [token.id for token in tokens]} if self._ids else {}
        logprobs = self._likelihoods(tokens, at) if self._logprobs else None
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish, **ids}

    def _likelihoods(self, tokens: Sequence[Token], at: int) -> dict[str, Any]:
        """Lists with an item a token, of the text from the character ``at`` on."""
        likely = [token.likely for token in tokens if token.likely]
        texts = [self._spell(token.id) for token in tokens]
        found: dict[str, Any] = {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in likely],
            "top_logprobs": [{self._spell(token): logprob for token, logprob in each.top} for each in likely],
            "text_offset": [at + sum(map(len, texts[:index])) for index in range(len(texts))],
        }
        if self._ids:
            # Several tokens may have one text, so that golden prompts go by ids.
            found["top_token_ids"] = [[token for token, _ in each.top] for each in likely]
            found["top_token_logprobs"] = [[logprob for _, logprob in each.top] for each in likely]
        return found
