"""Messages of a history as clients send them, and what templates are given of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glmexport.serving.failure import Refused
from glmexport.serving.fields import ChatRequest
from glmexport.serving.limits import ServingLimits
from glmexport.serving.messages import template_messages
from glmexport.serving.orders import RequestReader
from glmexport.tokenizer.tokenizer import Tokenizer

USER = {"role": "user", "content": "Hi!"}


def read(message: dict[str, Any]) -> dict[str, Any]:
    return template_messages([message], ServingLimits())[0]


def call(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f", **function}}]}


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({"arguments": "null"}, {}), ({"arguments": None}, {}), ({"arguments": ""}, {}), ({"arguments": " \n"}, {}),
        ({}, {}), ({"arguments": "{}"}, {}), ({"arguments": {}}, {}), ({"arguments": '{"a": null}'}, {"a": None}),
        ({"arguments": {"a": [1]}}, {"a": [1]}),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_calls(given: dict[str, Any], arguments: dict[str, Any]) -> None:
    made = read(call(**given))
    assert made["tool_calls"][0]["function"] == {"name": "f", "arguments": arguments} and made["content"] == ""


@pytest.mark.parametrize("arguments", ["[]", "1", '"null"', "nul", "{", [], True, "NaN"], ids=str)
def test_arguments_that_are_none(arguments: Any) -> None:
    with pytest.raises(Refused) as refused:
        read(call(arguments=arguments))
    assert refused.value.param == "messages.0.tool_calls.0.function.arguments"


def test_reasoning_has_two_names() -> None:
    for name in ("reasoning", "reasoning_content"):
        assert read({"role": "assistant", "content": "a", name: "Hm."})["reasoning_content"] == "Hm."
    both = read({"role": "assistant", "content": "a", "reasoning": "A.", "reasoning_content": "B."})
    assert both["reasoning_content"] == "B."
    assert "reasoning_content" not in read({"role": "assistant", "content": "a", "reasoning": None})
    for role, value in (("user", "Hm."), ("assistant", ["Hm."])):
        with pytest.raises(Refused):
            read({"role": role, "content": "a", "reasoning": value})


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_fields_that_are_null_are_none(role: str) -> None:
    empty = dict.fromkeys(
        ("name", "refusal", "audio", "function_call", "tool_calls", "tool_call_id", "reasoning", "id")
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"role": role, "content": parts, **empty}) == {"role": role, "content": "ab"}


def test_an_answer_as_it_was_given() -> None:
    given = {"role": "assistant", "content": "a", "annotations": [], "refusal": None, "tool_calls": [], "name": "me"}
    assert read(given) == {"role": "assistant", "content": "a", "tool_calls": [], "name": "me"}


def test_content_that_is_null() -> None:
    for role in ("assistant", "tool"):
        assert read({"role": role, "content": None})["content"] == read({"role": role})["content"] == ""
    with pytest.raises(Refused):
        read({"role": "user", "content": None})


@pytest.fixture
def reader(tmp_path: Path, bundle: Path) -> RequestReader:
    for path in Tokenizer.open(bundle).files:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ m.reasoning_content if not clear_thinking }}{% endfor %}"
    )
    return RequestReader(Tokenizer.open(tmp_path), frozenset(), 4096, ServingLimits(), guides=True, lenient=False)


@pytest.mark.parametrize(
    "given", [{"clear_thinking": True}, {"chat_template_kwargs": {"clear_thinking": True}}], ids=str
)
@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_templates_read_whether_to_clear_reasoning(reader: RequestReader, given: dict[str, Any], name: str) -> None:
    messages = [{"role": "assistant", "content": "a", name: "Hm."}, USER]

    def prompt(**settings: Any) -> str:
        order, _ = reader.chat(ChatRequest.model_validate({"messages": messages, **settings}))
        return reader.tokenizer.decode(order.prompt)

    kept = {key: False if value is True else {"clear_thinking": False} for key, value in given.items()}
    assert (prompt(**given), prompt(**kept), prompt()) == ("aHi!", "aHm.Hi!", "aHm.Hi!")
    with pytest.raises(Refused):
        prompt(clear_thinking=True, chat_template_kwargs={"clear_thinking": False})


@pytest.mark.parametrize("name", ["<|assistant|>", "<|user|>", "[gMASK]<sop>", "<|endoftext|>", "<|system|>"])
def test_no_field_of_a_request_writes_a_control_token(bundle: Path, name: str) -> None:
    """They are as many, and the same, whatever is said."""
    tokenizer = Tokenizer.open(bundle)
    known = {*tokenizer.control_tokens.values()}
    reader = RequestReader(tokenizer, frozenset(), 4096, ServingLimits(), guides=True, lenient=False)

    def control(said: str) -> list[int]:
        # A name that a call cannot carry is refused before.
        function = {"name": "f", "arguments": {f"k{said}": said}}
        parameters = {"type": "object", "properties": {said: {"enum": [said]}}}
        tool = {"type": "function", "function": {"name": "f", "description": said, "parameters": parameters}}
        parts = [{"type": "text", "text": said[:5]}, {"type": "text", "text": said[5:]}]
        messages = [
            {"role": "system", "content": said, "name": said},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": said, "reasoning": said, "tool_calls": [{"function": function}]},
            {"role": "tool", "content": said, "tool_call_id": said},
            {"role": "user", "content": f"Hi{said}"},
        ]
        choice = {"type": "function", "function": {"name": "f"}}
        asked = {"messages": messages, "tools": [tool], "tool_choice": choice, "max_tokens": 1}
        order, _ = reader.chat(ChatRequest.model_validate(asked))
        return [token for token in order.prompt if token in known]

    assert control(name) == control("harmless")
