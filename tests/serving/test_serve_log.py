"""Nothing of a request or of an answer is logged, whatever fails and wherever."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import PATIENCE_S, start
from test_scheduler import Waiting, client_of, surface

from glmexport.serving.limits import ServingLimits
from glmexport.serving.log import described, logged_to, on_loop_failure

MARK = "Geheimnis-4711"
TOOL = {
    "type": "function",
    "function": {"name": "Geheimnis-4711", "description": MARK, "parameters": {"type": "object"}},
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"schema": {"type": "object", "properties": {MARK: {"type": "string"}}}},
}


def chat(**changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{MARK} Hi!"}]
    return {"messages": messages, "max_tokens": 4, "temperature": 0, "stop": [MARK], **changes}


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What is logged."""
    stream = io.StringIO()
    with logged_to(stream):
        yield stream


def fails(*given: Any, **named: Any) -> Any:
    """What a library does that quotes all that it was given."""
    try:
        raise KeyError(f"{MARK} {given} {named}")
    except KeyError as error:
        raise ValueError(f"{MARK} cannot be read: {error}") from error


FAILING = (
    "glmexport.tokenizer.tokenizer.Tokenizer.encode", "glmexport.tokenizer.tokenizer.Tokenizer.decode",
    "glmexport.serving.app.read_body", "glmexport.serving.orders.template_messages",
    "glmexport.chat.grammar.Grammar.feed", "glmexport.chat.grammar.Grammar.finish",
    "glmexport.serving.reply.usage", "glmexport.serving.answer.FreeTurns.turn", "glmexport.serving.answer.choose",
    "glmexport.engine.genai.GenaiEngine.begin", "glmexport.serving.answer.PendingAnswer.say",
    "glmexport.serving.text.AnswerText.add", "glmexport.serving.scheduler.Scheduler.submit",
)  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", FAILING)
def test_an_error_is_logged_by_kind_place_and_request(
    bundle: Path, log: io.StringIO, monkeypatch: pytest.MonkeyPatch, place: str, stream: bool
) -> None:
    waiting = Waiting(bundle)
    guard, _ = surface(waiting, bundle, ServingLimits())
    waiting.scheduler.start()
    assert waiting.loaded.wait(PATIENCE_S)
    monkeypatch.setattr(place, fails)

    async def ask() -> Any:
        async with client_of(guard) as http:
            options = {"stream_options": {"include_usage": True}} if stream else {}
            return await http.post("/v1/chat/completions", json=chat(stream=stream, tools=[TOOL], **options))

    answer = asyncio.run(ask())
    waiting.scheduler.close()
    assert waiting.scheduler.join(PATIENCE_S)
    said = log.getvalue()
    assert MARK not in said
    assert "ValueError at serving/test_serve_log.py:" in said and "after KeyError" in said
    assert answer.headers["x-request-id"] in said and said.count("\n") == 1
    assert answer.status_code == 500 or (stream and "The server failed" in answer.text and "[DONE]" in answer.text)


def test_what_nobody_catches(log: io.StringIO) -> None:
    thread = threading.Thread(target=fails, args=(1,))
    thread.start()
    thread.join()
    warnings.showwarning(UserWarning(MARK), UserWarning, __file__, 1)
    logging.getLogger("some.library").error("%s is wrong", MARK, exc_info=ValueError(MARK))

    async def callback() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(on_loop_failure)
        loop.call_soon(fails, MARK)
        # Nobody asks what became of it.
        failed = loop.run_in_executor(None, fails, MARK)
        await asyncio.wait([failed])
        del failed
        gc.collect()

    asyncio.run(callback())
    said = log.getvalue()
    assert MARK not in said and said.count("\n") >= 5 and said.count("test_serve_log.py") >= 4


def test_what_led_to_an_error_is_told_by_kind() -> None:
    with pytest.raises(ValueError) as raised:
        fails()
    said = described(raised.value)
    assert said.startswith("ValueError at serving/test_serve_log.py:") and "; after KeyError at" in said


def test_a_server_writes_nothing_of_what_it_is_asked(bundle: Path, tmp_path: Path) -> None:
    """Good requests and bad ones, by every field; the runtime writes to the same place."""
    log = tmp_path / "log"
    bodies: list[dict[str, Any]] = [
        chat(), chat(response_format=SCHEMA), chat(tools=[TOOL]),
        chat(messages=[{"role": "user", "content": f"{MARK}#"}], tools=[TOOL], max_tokens=60),
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": MARK}}),
        *(
            chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
            for schema in ({"type": MARK}, {"type": "string", "pattern": f"({MARK}"}, {"$ref": f"#/{MARK}"})
        ),
        chat(model=MARK), chat(tools=[{"type": MARK}]), {MARK: MARK}, chat(seed=MARK), chat(**{MARK: 1}),
        {"prompt": MARK, "max_tokens": 2}, {"prompt": [MARK, MARK]}, {"prompt": MARK * 20_000},
    ]  # fmt: skip
    with log.open("w") as stream:
        server = start(bundle, stderr=stream)
        with server.http() as http:
            for body in bodies:
                for path in ("/v1/chat/completions", "/v1/completions"):
                    for streamed in (False, True):
                        assert http.post(path, json={**body, "stream": streamed}).status_code in (200, 400, 404), body
            http.post("/v1/completions", content=f'{{"{MARK}'.encode(), headers={"content-type": "application/json"})
            assert http.get(f"/{MARK}", headers={"x": MARK}).status_code == 404
        assert server.stop() == 0
    assert MARK not in log.read_text() and json.dumps(MARK)[1:-1] not in log.read_text()
