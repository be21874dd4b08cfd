"""Bodies that cost much to read: each is refused, while others are answered and memory stays what it was."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
from served import Served
from test_serve_hostile import CHAT, JSON, refused, user

#: Nearly as much as a body may have.
SIZE = 4_000_000
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f"}}
#: How long others wait at most; a busy machine has its share in it.
ALIVE_S = 0.5
GROWTH_BYTES = 200 << 20


def many(item: str) -> list[Any]:
    """As many of a JSON value as fit into a body."""
    value = json.loads(item)
    return [value] * (SIZE // (len(item) + 1))


def fields(count: int = SIZE // 13) -> dict[str, int]:
    return {f"k{at}": 1 for at in range(count)}


def chat(**changes: Any) -> dict[str, Any]:
    return {**CHAT, **changes}


def calls(value: Any) -> list[Any]:
    return [*user(), {"role": "assistant", "tool_calls": value}]


BODIES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "a long message": (CHAT_PATH, lambda: chat(messages=user(content="hello you, 12 " * (SIZE // 14)))),
    "a long text": (TEXT_PATH, lambda: {"prompt": "hello you, 12 " * (SIZE // 14)}),
    "stops that are no texts": (CHAT_PATH, lambda: chat(stop=many("1"))),
    "many stops": (TEXT_PATH, lambda: {"prompt": "a", "stop": many('"a"')}),
    "prompts that are no tokens": (TEXT_PATH, lambda: {"prompt": many("1.5")}),
    "many prompts": (TEXT_PATH, lambda: {"prompt": many('"a"')}),
    "prompts of tokens": (TEXT_PATH, lambda: {"prompt": many("[]")}),
    "many tokens": (TEXT_PATH, lambda: {"prompt": many("1")}),
    "a last token that is none": (TEXT_PATH, lambda: {"prompt": [*many("1"), "a"]}),
    "unknown fields": (CHAT_PATH, lambda: {**CHAT, **fields()}),
    "unknown fields of a text": (TEXT_PATH, lambda: {"prompt": "a", **fields()}),
    "unknown fields of a tool": (CHAT_PATH, lambda: chat(tools=[{**TOOL, **fields()}])),
    "unknown fields of a message": (CHAT_PATH, lambda: chat(messages=user(**fields()))),
    "unknown settings": (CHAT_PATH, lambda: chat(chat_template_kwargs=fields())),
    "messages that are none": (CHAT_PATH, lambda: chat(messages=many("1"))),
    "empty messages": (CHAT_PATH, lambda: chat(messages=many("{}"))),
    "parts of a message": (CHAT_PATH, lambda: chat(messages=user(content=many("{}")))),
    "tools that are none": (CHAT_PATH, lambda: chat(tools=many("1"))),
    "parameters of a tool": (
        CHAT_PATH,
        lambda: chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"enum": many("1")}}}]),
    ),
    "calls that are none": (CHAT_PATH, lambda: chat(messages=calls(many("1")))),
    "arguments of a call": (
        CHAT_PATH,
        lambda: chat(messages=calls([{"function": {"name": "f", "arguments": json.dumps({"a": [[]] * (SIZE // 5)})}}])),
    ),
    "biases": (CHAT_PATH, lambda: chat(logit_bias=fields())),
    "what is not read": (CHAT_PATH, lambda: chat(metadata=many("[]"))),
    "a schema": (
        CHAT_PATH,
        lambda: chat(response_format={"type": "json_schema", "json_schema": {"schema": {"enum": many("1")}}}),
    ),
    "a name that is long": (CHAT_PATH, lambda: {**CHAT, "k" * SIZE: 1}),
}  # fmt: skip


class Watch:
    """How long a server needs to say that it is alive, and how much memory it takes, while something else goes on."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self._process = psutil.Process(server.process.pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.longest_s = 0.0
        self.before = self.most = self._process.memory_info().rss

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        with self._server.http() as http:
            while not self._stop.wait(0.01):
                begun = time.monotonic()
                http.get("/healthz").raise_for_status()
                self.longest_s = max(self.longest_s, time.monotonic() - begun)
                self.most = max(self.most, self._process.memory_info().rss)


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with served.http() as made:
        yield made


@pytest.mark.parametrize("name", BODIES)
def test_others_are_answered_while_a_body_is_refused(served: Served, http: httpx.Client, name: str) -> None:
    path, make = BODIES[name]
    body = json.dumps(make(), separators=(",", ":")).encode()
    assert SIZE / 2 < len(body) < 4 << 20
    with Watch(served) as watch:
        begun = time.monotonic()
        answer = http.post(path, content=body, headers=JSON)
        took_s = time.monotonic() - begun
    refused(answer, 400)
    assert len(answer.content) < 2000

    assert watch.longest_s < ALIVE_S and watch.most - watch.before < GROWTH_BYTES and took_s < 10


def test_levels_are_counted_before_anything_is_read(http: httpx.Client) -> None:
    body = b'{"messages": [' + b"[" * 900 + b"]" * 900 + b"]}"
    assert refused(http.post(CHAT_PATH, content=body, headers=JSON), 400)["code"] == "invalid_json"
