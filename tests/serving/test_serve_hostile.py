"""Requests that nobody should send: each is refused in the form of an error, and the server goes on."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from builds import Run
from served import PATIENCE_S, Served, start

CHAT = {"messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 2, "temperature": 0}
JSON = {"content-type": "application/json"}
TOOL = {"type": "function", "function": {"name": "f"}}
PATHS = (
    "/", "/v1", "/v1/chat", "/v1/models/", "/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2fbundle.json",
    "//v1/models", "/v1/chat/completions/", "/bundle.json", "/docs", "/openapi.json",
)  # fmt: skip
METHODS = (
    ("GET", "/v1/chat/completions"), ("DELETE", "/v1/models"), ("PUT", "/metrics"), ("TRACE", "/healthz"),
    ("OPTIONS", "/v1/chat/completions"),
)  # fmt: skip
NOT_OURS = (
    "evil.example", "127.0.0.1.evil.example", "localhost.evil", "", "localhost:80:80", "[::1", "[::1]80",
    "localhost@evil.example", "127.0.0.1:http", "10.0.0.1",
)  # fmt: skip
NO_NAMES: tuple[Any, ...] = (
    "", " ", "a b", "a\n", "x</tool_call>y", "<tool_call>", "a<arg_key>b", "</think>", "<|user|>", "[gMASK]",
    "a\x1b[2J", "a\u202eb", "x" * 257, 1, None, ["f"], {"f": 1},
)  # fmt: skip
NO_PROMPTS: tuple[Any, ...] = (
    [], [10**9], [-1], [2**70], [["a"]], [True], [1.5], ["a", "b"], {"a": 1}, [[1], [2]], [[]], [[1, "a"]],
)  # fmt: skip


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with served.http() as made:
        yield made


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a refusal, which has OpenAI's form."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and "Traceback" not in response.text
    assert response.headers["content-type"] == "application/json"
    return error  # type: ignore[no-any-return]


def chat(**changes: Any) -> dict[str, Any]:
    return {**CHAT, **changes}


def user(**changes: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hi!", **changes}]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": 1, "a": 2}', b'{"temperature": NaN}', b'{"temperature": 1e999}',
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b'{"a":' * 80 + b"1" + b"}" * 80 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
    ids=range(12),
)  # fmt: skip
def test_bodies_that_are_no_request(http: httpx.Client, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        refused(http.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": "hot"}, "temperature"), ({"temperature": True}, "temperature"),
        ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"n": 2}, "n"), ({"n": True}, "n"), ({"stop": [""]}, "stop"), ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "x" * 300}, "stop"), ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"), ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"chat_template": "{{ 7*7 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs.add_generation_prompt"),
        ({"unheard_of": 1}, "unheard_of"), ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "f", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x</tool_call>y"}},
          "tools": [{"type": "function", "function": {"name": "x</tool_call>y"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"), ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "tools": [TOOL]}, "response_format"),
        ({"messages": []}, "messages"), ({"messages": "Hi"}, "messages"), ({"messages": user() * 4097}, "messages"),
        ({"messages": user(role="root")}, "messages.0.role"), ({"messages": user(role=["user"])}, "messages.0.role"),
        ({"messages": user(content=None)}, "messages.0.content"), ({"messages": user(evil=1)}, "messages.0.evil"),
        ({"messages": user(content=[{"type": "image_url"}])}, "messages.0.content"),
        ({"messages": user(content={"text": "Hi"})}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
         "messages.0.tool_calls.0.function.arguments"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_fields_that_are_wrong(http: httpx.Client, changes: dict[str, Any], param: str) -> None:
    error = refused(http.post("/v1/chat/completions", json=chat(**changes)), 400)
    assert error["param"] == param


@pytest.mark.parametrize("name", NO_NAMES, ids=ascii)
@pytest.mark.parametrize("place", ["tools", "tool_choice", "call", "answer"])
def test_names_that_no_call_can_carry(http: httpx.Client, place: str, name: Any) -> None:
    function = {"type": "function", "function": {"name": name}}
    changes: dict[str, dict[str, Any]] = {
        "tools": {"tools": [function]},
        "tool_choice": {"tools": [TOOL], "tool_choice": function},
        "call": {"messages": [*user(), {"role": "assistant", "tool_calls": [function]}]},
        "answer": {"messages": [*user(), {"role": "tool", "name": name or 1, "content": "a"}]},
    }
    error = refused(http.post("/v1/chat/completions", json=chat(**changes[place])), 400)
    assert error["param"].startswith(tuple(changes[place]))


@pytest.mark.parametrize("name", ["get_weather", "größe", "मौसम", "天气", "a.b:c-d/e", "x" * 256])
def test_names_of_any_script(http: httpx.Client, name: str) -> None:
    function = {"type": "function", "function": {"name": name}}
    messages = [
        *user(),
        {"role": "assistant", "tool_calls": [function]},
        {"role": "tool", "name": name, "content": "a"},
    ]
    answer = http.post("/v1/chat/completions", json=chat(messages=[*messages, *user()], tools=[function]))
    assert answer.status_code == 200, answer.text


def test_arguments_that_are_no_text(http: httpx.Client) -> None:
    for arguments in ('{"a": "\\ud800"}', '{"\\udfff": 1}'):
        call = {"function": {"name": "f", "arguments": arguments}}
        messages = [*user(), {"role": "assistant", "tool_calls": [call]}, *user()]
        refused(http.post("/v1/chat/completions", json=chat(messages=messages)), 400)


@pytest.mark.parametrize("prompt", NO_PROMPTS, ids=str)
def test_prompts_that_are_none(http: httpx.Client, prompt: Any) -> None:
    refused(http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}), 400)


def test_the_empty_text_is_what_every_sequence_begins_with(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "", "max_tokens": 1})
    assert answer.json()["usage"]["prompt_tokens"] == 2


def test_what_changes_nothing_is_ignored(http: httpx.Client) -> None:
    neutral = {
        "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "store": False,
        "metadata": {"a": "b"}, "parallel_tool_calls": True, "stop": None, "seed": None, "top_k": -1, "tools": None,
    }  # fmt: skip
    answer = http.post("/v1/chat/completions", json=chat(**neutral))
    assert answer.status_code == 200, answer.text


def test_a_schema_that_is_none(http: httpx.Client) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    refused(http.post("/v1/chat/completions", json=chat(response_format=form)), 400)


def test_paths_and_methods(http: httpx.Client) -> None:
    for path in PATHS:
        refused(http.get(path), 404)
    for method, path in METHODS:
        answer = http.request(method, path)
        refused(answer, 405)
        assert "allow" in answer.headers and "access-control-allow-origin" not in answer.headers


def test_no_other_type_of_body(http: httpx.Client) -> None:
    """What a form on a page of anybody's could send."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = http.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": kind})
        assert refused(answer, 400)["code"] == "unsupported_content_type"


@pytest.mark.parametrize("host", NOT_OURS)
def test_a_name_that_is_not_ours(http: httpx.Client, host: str) -> None:
    for method, path in (*METHODS, ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/healthz")):
        assert refused(http.request(method, path, headers={"host": host}), 403)["code"] == "host_refused"


def test_names_that_are_ours(http: httpx.Client) -> None:
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000"):
        assert http.get("/healthz", headers={"host": host}).status_code == 200


def test_origins(http: httpx.Client, served: Served) -> None:
    for origin in ("http://evil.example", "null", "http://localhost:1", "file://", ""):
        for method in ("GET", "POST", "OPTIONS"):
            answer = http.request(method, "/v1/chat/completions", headers={"origin": origin, **JSON})
            assert refused(answer, 403)["code"] == "origin_refused"
    assert http.get("/v1/models", headers={"origin": served.url}).status_code == 200


def test_a_body_that_is_too_large(http: httpx.Client) -> None:
    large = json.dumps(chat(messages=user(content="x" * (5 << 20)))).encode()
    assert refused(http.post("/v1/chat/completions", content=large, headers=JSON), 413)["code"] == "too_large"

    def parts() -> Iterator[bytes]:
        for start_ in range(0, len(large), 1 << 16):
            yield large[start_ : start_ + (1 << 16)]

    # The answer may be lost where the server closes while the client still sends.
    with suppress(httpx.TransportError):
        refused(http.post("/v1/chat/completions", content=parts(), headers=JSON), 413)
    assert http.get("/readyz").status_code == 200


def test_heads_that_do_not_come(served: Served) -> None:
    """Connections that say nothing, or never finish their first lines, are closed; others are answered meanwhile."""
    port = httpx.URL(served.url).port
    assert port
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    for at, connection in enumerate(silent):
        if at % 2:
            connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: localh")
    with served.http() as http:
        assert http.get("/readyz").status_code == 200
    for connection in silent:
        connection.settimeout(PATIENCE_S)
        assert connection.recv(100) == b""
        connection.close()


def test_a_head_that_never_ends(served: Served) -> None:
    port = httpx.URL(served.url).port
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(PATIENCE_S)
        connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (1 << 17))
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    with served.http() as http:
        assert http.get("/readyz").status_code == 200


def test_a_key_is_needed_where_there_is_one(bundle: Path, tmp_path: Path, run: Run) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first-key-of-the-house\nsecond-key-of-the-house\n")
    keys.chmod(0o644)
    assert run("serve", bundle, "--port", 0, "--api-key-file", keys).code == 64
    keys.chmod(0o600)
    open_to_all = ("--api-key-file", keys, "--host", "0.0.0.0", "--allow-host", "models.example")
    server = start(
        bundle, *open_to_all, "--max-queue", 2, "--name", "tiny", "--parallel", 1, "--drain-s", 0.5, "--lenient"
    )
    try:
        _locked(server)
        _apart(server)
        _lenient(server)
        _full(server)
        _given_up(server)
    finally:
        assert server.stop() == 0


def _locked(server: Served) -> None:
    right = {"authorization": "Bearer second-key-of-the-house"}
    with server.http() as http:
        assert http.get("/healthz").status_code == http.get("/readyz").status_code == 200
        for key in ("", "Bearer", "Bearer wrong", "Basic second-key-of-the-house", "Bearer second-key-of-the-hous"):
            for path in ("/metrics", "/v1/models", "/nowhere"):
                answer = http.get(path, headers={"authorization": key})
                assert (
                    refused(answer, 401)["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
                )
        assert http.get("/metrics", headers=right).status_code == 200
        assert http.get("/v1/models", headers={"authorization": "bearer first-key-of-the-house"}).status_code == 200
        # By the name that was allowed, and by the address that the client came to.
        assert http.get("/v1/models", headers={**right, "host": "models.example:443"}).status_code == 200
        refused(http.get("/v1/models", headers={**right, "host": "other.example"}), 403)
    with pytest.raises(Exception, match="401"):
        server.client(api_key="wrong-key").models.list()


def _apart(server: Served) -> None:
    """What one key asked is gone on with for that key, and tells another nothing."""
    asked = {"prompt": "a" * 1200, "max_tokens": 1}
    cached = []
    for key in ("first", "first", "second", "second"):
        with server.http(headers={"authorization": f"Bearer {key}-key-of-the-house"}) as http:
            usage = http.post("/v1/completions", json=asked).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == cached[2] == 0 < cached[1] == cached[3]


def _lenient(server: Served) -> None:
    """A call that is not closed where it should be is repaired, and counted."""
    right = {"authorization": "Bearer second-key-of-the-house"}
    tool = {"type": "function", "function": {"name": "get_weather"}}
    with server.http(headers=right) as http:
        answer = http.post("/v1/chat/completions", json=chat(messages=user(content="Hi%"), tools=[tool], max_tokens=60))
        (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Bern"}
        assert "glmexport_tool_call_repairs_total 1.0" in http.get("/metrics").text
        # Cut by the number of tokens or a stop string, the same is no call.
        for cut in ({"max_tokens": 12}, {"stop": "Bern"}):
            body = chat(messages=user(content="Hi%"), tools=[tool], **{"max_tokens": 60, **cut})
            message = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
            assert "tool_calls" not in message and message["content"].startswith("<tool_call>get_weather")


def _full(server: Served) -> None:
    """One runs and two wait: the next is told to come again, and every other is answered."""
    client = server.client(api_key="first-key-of-the-house")
    asked: Any = {"model": "tiny", "messages": user(content="Endless~"), "temperature": 0, "stream": True}

    def ask() -> int:
        return len(list(client.chat.completions.create(**asked, max_tokens=5)))

    with ThreadPoolExecutor(8) as pool:
        first = client.chat.completions.create(**asked, max_tokens=3900)
        next(iter(first))
        waiting = [pool.submit(ask) for _ in range(2)]
        right = {"authorization": "Bearer first-key-of-the-house"}
        with server.http(headers=right) as http:
            deadline = time.monotonic() + PATIENCE_S
            while "glmexport_waiting 2.0" not in http.get("/metrics").text:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            answer = http.post("/v1/chat/completions", json=CHAT)
            assert refused(answer, 429)["code"] == "queue_full" and int(answer.headers["retry-after"]) > 0
        first.close()
        assert all(future.result(PATIENCE_S) > 2 for future in waiting)
    client.close()


def _given_up(server: Served) -> None:
    """What does not end in the time that it has when the server ends is told so."""
    with server.client(api_key="first-key-of-the-house") as client:
        asked: Any = {"model": "tiny", "messages": user(content="Endless~"), "temperature": 0}
        with client.chat.completions.create(**asked, max_tokens=3900, stream=True) as stream:
            next(iter(stream))
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="about to end"):
                list(stream)


@pytest.mark.parametrize("text", ["", "\n", "short\n", "has a space in the middle\n", "schlüssel-schlüssel\n"])
def test_key_files_that_are_none(bundle: Path, tmp_path: Path, run: Run, text: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text(text)
    keys.chmod(0o600)
    outcome = run("serve", bundle, "--port", 0, "--api-key-file", keys)
    assert outcome.code == 64 and "openssl rand" in outcome.stderr


def test_without_the_extra(bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    outcome = run("serve", bundle, "--port", 0)
    assert outcome.code == 69 and "uvicorn" in outcome.stderr and "pip install 'glmexport[serve]'" in outcome.stderr


def test_what_cannot_be_served(bundle: Path, tmp_path: Path, run: Run, served: Served) -> None:
    outside = run("serve", bundle, "--host", "0.0.0.0", "--port", 0)
    assert outside.code == 64 and "--api-key-file" in outside.stderr
    assert run("serve", tmp_path, "--port", 0).code == 64
    assert run("serve", bundle, "--host", "no.such.host.example", "--port", 0).code == 64
    taken = run("serve", bundle, "--port", httpx.URL(served.url).port)
    assert taken.code == 69 and "Address already in use" in taken.stderr
    assert run("serve", bundle, "--port", 0, "--api-key-file", tmp_path / "none").code == 69
    assert run("serve", bundle, "--port", 0, "--api-key-file", tmp_path).code in (64, 69)
