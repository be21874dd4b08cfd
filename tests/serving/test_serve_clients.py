"""OpenAI's own client against a server process."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from scripted import SCRIPTS
from served import Served

from glmexport.bundle.bundle import Bundle
from glmexport.engine.generation import GenerationSession
from glmexport.engine.text import generate
from glmexport.tokenizer.tokenizer import Tokenizer

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
ARGUMENTS = {"city": 'Zurich {"a": 1}', "days": 3}


def says(text: str) -> Any:
    return [{"role": "user", "content": text}]


def greedy(bundle: Path, text: str, count: int) -> tuple[list[int], str]:
    """Tokens and text as ``glmexport run`` has them."""
    tokenizer = Tokenizer.open(bundle)
    prompt = tokenizer.encode_chat(says(text), add_generation_prompt=True)
    pieces = list(generate(Bundle.open(bundle), prompt, max_tokens=count, threads=1))
    return [piece.token for piece in pieces], "".join(piece.text for piece in pieces)


def test_models(client: openai.OpenAI, served: Served) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "glmexport")
    assert client.models.retrieve("tiny") == model and model.digest == served.digest


def test_chat_whole_and_streamed_is_what_run_gives(client: openai.OpenAI, bundle: Path) -> None:
    for text in ("Hi!", "Hello", "你好", "x" * 300):
        tokens, expected = greedy(bundle, text, 40)
        asked: Any = {"model": "tiny", "messages": says(text), "max_tokens": 40, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == expected and whole.usage
        assert whole.usage.completion_tokens == len(tokens)
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + len(tokens)
        assert whole.choices[0].finish_reason == ("length" if len(tokens) == 40 else "stop")
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == [
            whole.choices[0].finish_reason
        ]
        usage = chunks[-1].usage
        assert usage and usage.completion_tokens == len(tokens) and not chunks[-1].choices
        timings = usage.timings  # type: ignore[attr-defined]
        assert timings["ttft_s"] > timings["queue_s"] >= 0
        assert (timings["tpot_s"] is None) == (usage.completion_tokens < 2)
        assert len({chunk.id for chunk in chunks}) == 1


def test_text_and_token_ids_go_on_as_the_model_does(client: openai.OpenAI, bundle: Path) -> None:
    tokenizer = Tokenizer.open(bundle)
    prompt = tokenizer.prefix + tokenizer.encode("Hello there")
    expected = GenerationSession.open(Bundle.open(bundle), 1).tokens(prompt, 12)
    given: tuple[Any, ...] = ("Hello there", ["Hello there"], prompt, [prompt], "[gMASK]<sop>Hello there")
    for form in given:
        answer = client.completions.create(
            model="tiny", prompt=form, max_tokens=12, temperature=0, logprobs=3, extra_body={"return_token_ids": True}
        )
        assert answer.prompt_token_ids == prompt  # type: ignore[attr-defined]
        (choice,) = answer.choices
        # The end token is told, too, which no text shows.
        assert choice.token_ids == expected and choice.text == tokenizer.decode(expected)  # type: ignore[attr-defined]
        assert answer.usage and answer.usage.completion_tokens == len(expected) - (choice.finish_reason == "stop")
        likely: Any = choice.logprobs
        assert [ids[0] for ids in likely.top_token_ids] == expected
        assert [logprobs[0] for logprobs in likely.top_token_logprobs] == likely.token_logprobs
        assert all(len(ids) == 3 for ids in likely.top_token_ids)
    short = client.completions.create(model="tiny", prompt="Hello~", temperature=0)
    assert short.usage and short.usage.completion_tokens == 16


def test_likelihoods_in_a_chat(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "tiny", "messages": says("Hello"), "max_tokens": 8, "temperature": 0, "logprobs": True,
        "top_logprobs": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    assert whole and whole.content and 0 < len(whole.content) <= 8
    for entry in whole.content:
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == whole.content
    plain = client.chat.completions.create(**{**asked, "logprobs": None, "top_logprobs": None})
    assert plain.choices[0].logprobs is None


def test_stop_strings_are_never_shown(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": says("Hi&"), "temperature": 0}
    for stop, expected in (
        ("here", "STOP is said "),
        (["P is", "then STOP"], "STO"),
        (["there, then S", "more"], "STOP is said here, not "),
        ("nowhere", SCRIPTS["&"]),
    ):
        whole = client.chat.completions.create(**asked, stop=stop).choices[0]
        assert (whole.message.content, whole.finish_reason) == (expected, "stop")
        parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(
            **asked, stop=stop, stream=True)]  # fmt: skip
        assert "".join(parts) == expected


def test_a_stop_string_that_is_a_special_token_ends_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=says("Hi!"), temperature=0, stop=["<|user|>"])
    assert answer.choices[0].message.content == SCRIPTS["!"]


def test_a_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    def ask(**settings: Any) -> str:
        answer = client.chat.completions.create(model="tiny", messages=says("Hello"), max_tokens=24, **settings)
        return answer.choices[0].message.content or ""

    first = ask(seed=5, temperature=1.5)
    assert ask(seed=5, temperature=1.5) == first
    assert len({ask(seed=seed, temperature=1.5) for seed in range(4)}) > 1
    assert len({ask(temperature=1.5) for _ in range(4)}) > 1
    assert ask(seed=1, temperature=0) == ask(temperature=0) == ask(seed=-3, top_p=1e-6)


def test_reasoning_is_apart_from_content(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": says("Hi?"), "temperature": 0}
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.content == "Nothing."
    assert message.reasoning_content == "What do I know?"  # type: ignore[attr-defined]
    reasoning, content = "", ""
    for chunk in client.chat.completions.create(**asked, stream=True):
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
    assert (reasoning, content) == ("What do I know?", "Nothing.")


@pytest.mark.parametrize(("cue", "names", "content", "reasoning"), [
    ("#", ["get_weather"], None, "I ask."), ("+", ["get_weather", "now"], "Done.", "Two: enough"),
])  # fmt: skip
def test_tool_calls(client: openai.OpenAI, cue: str, names: list[str], content: str | None, reasoning: str) -> None:
    asked: Any = {"model": "tiny", "messages": says(f"Weather{cue}"), "temperature": 0, "tools": [TOOL, NOW]}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == content
    assert choice.message.reasoning_content == reasoning  # type: ignore[attr-defined]
    calls: Any = choice.message.tool_calls
    assert [call.function.name for call in calls] == names and len({call.id for call in calls}) == len(names)
    assert json.loads(calls[0].function.arguments) == ARGUMENTS
    streamed: dict[int, list[str]] = {}
    finish = None
    for chunk in client.chat.completions.create(**asked, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            known = streamed.setdefault(call.index, ["", ""])
            known[0] += call.function.name or ""
            known[1] += call.function.arguments or ""
        finish = chunk.choices[0].finish_reason or finish
    assert finish == "tool_calls" and [name for name, _ in streamed.values()] == names
    assert json.loads(streamed[0][1]) == ARGUMENTS


def test_the_answer_to_a_tool_goes_back(client: openai.OpenAI) -> None:
    """What came as a message can be sent again, by the client's own objects."""
    messages: list[Any] = says("Weather#")
    first = client.chat.completions.create(model="tiny", messages=messages, temperature=0, tools=[TOOL])
    message = first.choices[0].message
    assert message.tool_calls
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Rain!"}]
    again = client.chat.completions.create(model="tiny", messages=messages, temperature=0, tools=[TOOL])
    assert again.choices[0].message.content == SCRIPTS["!"]


def test_a_call_that_is_asked_for(client: openai.OpenAI) -> None:
    """The answer begins as a call of that tool, whatever the model would have said."""
    named: Any = {"type": "function", "function": {"name": "now"}}
    asked: Any = {
        "model": "tiny",
        "messages": says("Hi!"),
        "temperature": 0,
        "tools": [TOOL, NOW],
        "tool_choice": named,
    }
    choice = client.chat.completions.create(**asked).choices[0]
    calls: Any = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["now"] and choice.finish_reason == "tool_calls"
    required = client.chat.completions.create(**{**asked, "tool_choice": "required", "max_tokens": 4}).choices[0]
    # Cut off, it is no call, and what was begun is text.
    assert (required.message.content or "").startswith("<tool_call>") and required.finish_reason == "length"
    for wrong in ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, {"tools": []}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**{**asked, **wrong})
        assert refused.value.param == "tool_choice"


def test_without_tools_a_call_is_text(client: openai.OpenAI) -> None:
    for settings in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        asked: Any = {"model": "tiny", "messages": says("Weather#"), "temperature": 0, **settings}
        choice = client.chat.completions.create(**asked).choices[0]
        assert (choice.message.content or "").startswith("<tool_call>get_weather") and choice.finish_reason == "stop"


def test_a_broken_call_is_text_and_counted(client: openai.OpenAI, served: Served) -> None:
    before = served.metric("glmexport_tool_call_faults_total")
    asked: Any = {"model": "tiny", "messages": says("Weather%"), "temperature": 0, "tools": [TOOL]}
    choice = client.chat.completions.create(**asked).choices[0]
    assert (choice.message.content, choice.finish_reason) == (SCRIPTS["%"], "stop")
    assert served.metric("glmexport_tool_call_faults_total") == before + 1


def test_thinking_can_be_switched_off(client: openai.OpenAI) -> None:
    def prompt_tokens(**settings: Any) -> int:
        answer = client.chat.completions.create(model="tiny", messages=says("Hi!"), max_tokens=1, **settings)
        assert answer.usage
        return answer.usage.prompt_tokens

    off = prompt_tokens(extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert off > prompt_tokens() == prompt_tokens(extra_body={"chat_template_kwargs": {"enable_thinking": True}})


def test_json_by_a_schema(client: openai.OpenAI) -> None:
    """What random weights say, held to a schema of few answers."""
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
        "required": ["answer", "sure"],
        "additionalProperties": False,
    }
    for settings in ({"temperature": 0}, {"seed": 3}):
        asked: Any = {"model": "tiny", "messages": says("Hello"), "max_tokens": 400, "logprobs": True, **settings}
        form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        choice = client.chat.completions.create(**asked, response_format=form).choices[0]
        if choice.finish_reason == "stop":
            read = json.loads(choice.message.content or "")
            assert read["answer"] in ("yes", "no") and isinstance(read["sure"], bool)
        else:
            assert (choice.message.content or "").lstrip().startswith("{")
        assert choice.logprobs and choice.logprobs.content
        assert client.chat.completions.create(**asked, response_format=form).choices[0].message == choice.message


def test_errors_are_those_of_the_client(client: openai.OpenAI) -> None:
    asked: Any = {"messages": says("Hi!"), "max_tokens": 1}
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", **asked)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        client.chat.completions.create(model="tiny", **asked, temperature=3)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=says("x" * 5000))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="at most 4096"):
        client.chat.completions.create(model="tiny", messages=says("Hi!"), max_tokens=5000)


def test_a_client_that_does_not_wait(client: openai.OpenAI, served: Served) -> None:
    """The answer that nobody waits for is cancelled, so that the next is given."""
    before = served.metric('glmexport_requests_total{end="cancelled"}')
    impatient = client.with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(model="tiny", messages=says("Endless~"), temperature=0, max_tokens=3900)
    with client.chat.completions.create(
        model="tiny", messages=says("Endless~"), temperature=0, max_tokens=3900, stream=True
    ) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 60
    while served.metric('glmexport_requests_total{end="cancelled"}') < before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert served.metric("glmexport_running") == 0


def test_nobody_gets_another_one_s_answer(client: openai.OpenAI) -> None:
    """Eight at a time, greedy and sampled, short and long: each as if it were alone."""
    asked: list[Any] = [
        {
            "model": "tiny", "messages": says(f"Question {at} " + "x" * (37 * at) + "!?#~&Hoq"[at % 8]), "seed": at,
            "temperature": (0, 1.2)[at % 2], "max_tokens": 8 + 9 * at,
        }
        for at in range(16)
    ]  # fmt: skip

    def ask(settings: Any) -> Any:
        return client.chat.completions.create(**settings).choices[0].model_dump()

    alone = [ask(settings) for settings in asked]
    assert len({json.dumps(answer) for answer in alone}) > 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, asked)) == alone


def test_a_short_answer_does_not_wait_for_a_long_one(client: openai.OpenAI, served: Served) -> None:
    long = client.chat.completions.create(
        model="tiny", messages=says("Endless~"), temperature=0, max_tokens=3900, stream=True
    )
    with long as stream:
        next(iter(stream))
        short = client.chat.completions.create(model="tiny", messages=says("Hi!"), temperature=0)
        assert short.choices[0].message.content == SCRIPTS["!"]
        # It still runs, and its client is still there.
        assert served.metric("glmexport_running") == 1
        next(iter(stream))


def test_a_conversation_goes_on_where_it_was(client: openai.OpenAI, served: Served) -> None:
    before = served.metric("glmexport_reused_tokens_total")
    messages: list[Any] = says("Once upon a time, " * 40 + "there was nothing!")
    first = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
    assert first.usage
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *says("And then!")]
    second = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
    assert second.choices[0].message.content == SCRIPTS["!"] and second.usage
    details = second.usage.prompt_tokens_details
    # Whole pieces of what both prompts begin with.
    assert details and details.cached_tokens == 512 < first.usage.prompt_tokens
    assert served.metric("glmexport_reused_tokens_total") == before + details.cached_tokens
