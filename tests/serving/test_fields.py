"""Whatever JSON comes: an order for the model, or a refusal in the form of an error."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from served import PATIENCE_S
from test_scheduler import Waiting, client_of, surface

from glmexport.bundle.genai_config import GenaiConfig
from glmexport.serving.failure import Refused
from glmexport.serving.fields import IGNORED, NEUTRAL, ChatRequest, TextRequest, read_body
from glmexport.serving.guard import Guard
from glmexport.serving.guides import Guides
from glmexport.serving.limits import ServingLimits
from glmexport.serving.orders import RequestReader
from glmexport.tokenizer.tokenizer import Tokenizer

LIMITS = ServingLimits()
NAMES = sorted({*ChatRequest.model_fields, *TextRequest.model_fields, *NEUTRAL, *IGNORED})
WORDS = (
    "user", "assistant", "tool", "system", "role", "content", "text", "type", "function", "name", "arguments", "{}", "",
    "tool_calls", "json_object", "json_schema", "schema", "object", "auto", "required", "enable_thinking", "id",
    "<think>", "<tool_call>", "x</tool_call>y", "</arg_key>", "[gMASK]", '{"a": "\\ud800"}',
    "{{ 1 }}", "é你🎈", "\ud800", "parameters", "include_usage", "tiny",
)  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=8,
)
content = st.text(max_size=8) | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=4)}))
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "developer"]), "content": content},
    optional={"tool_calls": anything, "name": anything, "reasoning_content": st.text(max_size=4)},
)
bodies = st.dictionaries(st.sampled_from(NAMES), anything, max_size=5)
plausible = st.fixed_dictionaries(
    {"messages": st.lists(message, min_size=1, max_size=4)},
    optional={
        "tools": st.lists(
            st.fixed_dictionaries(
                {"type": st.just("function"), "function": st.fixed_dictionaries({"name": st.sampled_from(["f", "g"])})}
            ),
            max_size=2,
        ),
        "tool_choice": anything
        | st.sampled_from(["auto", "none", "required"])
        | st.sampled_from(["f", "h", "x</tool_call>y"]).map(
            lambda name: {"type": "function", "function": {"name": name}}
        ),
        "stream": st.booleans(),
        "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(0, 21),
        "chat_template_kwargs": st.fixed_dictionaries({"enable_thinking": st.booleans()}),
        "stop": st.lists(st.sampled_from(["a", "<|user|>", "你"]), max_size=3),
        "seed": st.integers(),
        "temperature": st.floats(0, 2),
        "response_format": anything
        | anything.map(
            lambda schema: {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": schema}}}}
        ),
        "max_tokens": st.integers(-1, 5000),
    },
)


@pytest.fixture(scope="module")
def reader(bundle: Path) -> RequestReader:
    return RequestReader(Tokenizer.open(bundle), frozenset({256}), 4096, LIMITS, guides=True, lenient=False)


def sent(body: Any) -> bytes:
    """As a client sends it that keeps to no rule."""
    return json.dumps(body).encode()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(body=bodies | plausible | anything)
def test_a_conversation_or_a_refusal(reader: RequestReader, body: Any) -> None:
    try:
        order, grammar = reader.chat(read_body(sent(body), ChatRequest, LIMITS))
    except Refused as refused:
        assert refused.status == 400 and json.dumps(refused.document)
        return
    assert 0 < len(order.prompt) < 4096 and 0 < order.max_tokens <= 4096 - len(order.prompt)
    assert 0 <= order.sampling.seed < 2**64 and grammar.finish() is not None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(body=bodies | st.fixed_dictionaries({"prompt": anything | st.lists(st.integers(-2, 600), max_size=5)}))
def test_a_text_or_a_refusal(reader: RequestReader, body: Any) -> None:
    try:
        order = reader.text(read_body(sent(body), TextRequest, LIMITS))
    except Refused as refused:
        assert refused.status == 400 and json.dumps(refused.document)
        return
    assert all(0 <= token < reader.tokenizer.vocabulary_size for token in order.prompt) and order.prompt


@given(data=st.binary(max_size=60))
def test_bytes_that_are_no_json(data: bytes) -> None:
    with pytest.raises(Refused):
        read_body(data, TextRequest, LIMITS)


def test_brackets_in_texts_are_no_arrays() -> None:
    text = '[{"\\' * 40_000
    assert read_body(sent({"prompt": text}), TextRequest, LIMITS).prompt == text


@pytest.mark.parametrize(
    "data", [b'{"a": "' + b'\\"[' * 1_000_000, b'"[' * 2_000_001, b"\\" * 2_000_000 + b"[" * 70_000]
)
def test_texts_that_are_not_closed_are_looked_at_once(data: bytes) -> None:
    begun = time.process_time()
    with pytest.raises(Refused):
        read_body(data, TextRequest, LIMITS)
    assert time.process_time() - begun < 2


def test_the_first_wrong_field_is_told_and_no_more_of_it_than_is_read() -> None:
    with pytest.raises(Refused) as raised:
        read_body(sent({"prompt": "a", "x" * 100_000: 1}), TextRequest, LIMITS)
    assert raised.value.code == "unknown_parameter" and len(json.dumps(raised.value.document)) < 2000


def test_a_text_that_cannot_fit_is_not_encoded(reader: RequestReader, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 4095 * max(len(text.encode()) for text in reader.tokenizer.special_tokens)
    assert reader.text(TextRequest(prompt="a" * 4000)).prompt
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("it was encoded"))
    with pytest.raises(Refused, match="context"):
        reader.text(TextRequest(prompt="a" * (40 * longest)))


@pytest.fixture(scope="module")
def answering(bundle: Path) -> Iterator[Guard]:
    """All of the server but its socket."""
    guides = Guides(bundle, GenaiConfig.read(bundle))
    waiting = Waiting(bundle, guides)
    guard, _ = surface(waiting, bundle, ServingLimits(answer_tokens=3))
    waiting.scheduler.start()
    yield guard
    waiting.scheduler.close()
    assert waiting.scheduler.join(PATIENCE_S)
    guides.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(
    body=st.builds(lambda one, other: {**one, **other}, plausible, bodies) | plausible | bodies,
    kind=st.sampled_from(["chat/completions", "completions"]),
)
def test_an_answer_or_a_refusal(answering: Guard, body: Any, kind: str) -> None:
    async def ask() -> httpx.Response:
        async with client_of(answering) as http:
            return await http.post(f"/v1/{kind}", content=sent(body), headers={"content-type": "application/json"})

    answer = asyncio.run(ask())
    assert answer.status_code in (200, 400, 404), answer.text
    assert "The server failed" not in answer.text and "The model failed" not in answer.text


@pytest.mark.parametrize(
    "changes",
    [
        {"stop": [1] * 60_000}, {"tools": [1] * 60_000}, {"messages": [1] * 60_000},
        {f"x{at}": 1 for at in range(60_000)},
        {"tools": [{"type": "function", "function": dict.fromkeys(map(str, range(60_000)))}]},
    ],
    ids=range(5),
)  # fmt: skip
def test_no_more_than_one_error_is_made(changes: dict[str, Any]) -> None:
    with pytest.raises(Refused) as raised:
        read_body(sent({"messages": [], **changes}), ChatRequest, LIMITS)
    assert isinstance(raised.value.__cause__, ValidationError) and raised.value.__cause__.error_count() == 1
