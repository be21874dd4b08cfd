"""A bundle whose latents are cached is served by our own loop, with the same answers; guessed tokens change none."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from scripted import SCRIPTS
from served import Served, scripted_bundle, start

from glmexport.bundle.bundle import Bundle
from glmexport.engine.text import generate
from glmexport.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return scripted_bundle(tmp_path_factory.getbasetemp(), "glm4_moe_lite")


@pytest.fixture(scope="module")
def latent_server(latent: Any) -> Iterator[Served]:
    server = start(latent, "--name", "tiny", "--speculate", "lookup")
    yield server
    assert server.stop() == 0


def test_answers_are_those_of_run(latent: Any, latent_server: Served) -> None:
    assert (latent / "loop.json").is_file()
    tokenizer = Tokenizer.open(latent)
    asked = ["Hi!", "Hello", "So?", "Endless~", "x" * 400, "Hello, hello, hello, hello"]

    def ask(text: str) -> tuple[str, int]:
        settings: Any = {"model": "tiny", "temperature": 0, "max_tokens": 48}
        answer = client.chat.completions.create(messages=[{"role": "user", "content": text}], **settings)
        message = answer.choices[0].message
        assert answer.usage
        return message.content or "", answer.usage.completion_tokens

    with latent_server.client() as client, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, asked))
    for text, (content, count) in zip(asked, answers, strict=True):
        prompt = tokenizer.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True)
        pieces = list(generate(Bundle.open(latent), prompt, max_tokens=48, threads=1))
        assert count == len(pieces)
        if text != "So?":
            assert content == "".join(piece.text for piece in pieces)
    assert answers[0][0] == SCRIPTS["!"] and answers[2][0] == "Nothing."
    # The endless answer repeats itself, which is what is looked up.
    assert latent_server.metric("glmexport_accepted_tokens_total") > 20


def test_what_its_loop_cannot_do_is_refused(latent_server: Served) -> None:
    with latent_server.client() as client, pytest.raises(openai.BadRequestError, match="held to JSON") as refused:
        message: Any = [{"role": "user", "content": "Hi!"}]
        client.chat.completions.create(model="tiny", messages=message, response_format={"type": "json_object"})
    assert refused.value.param == "response_format"
