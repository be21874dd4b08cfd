"""Greedy answers up to a stop string: of a bundle and a checkpoint alike, and as one token after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import THREADS, build, small_checkpoint
from hypothesis import given
from hypothesis import strategies as st

import glmexport.lm_eval.answering
import glmexport.workflows.build
from glmexport.bundle.bundle import Bundle
from glmexport.engine.generation import GenerationSession
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Silent
from glmexport.lm_eval.answering import (
    Ending,
    Prompt,
    Reading,
    fits_in_memory,
    looked_up,
    streamed_answers,
    verified_texts,
    whole_stream,
)
from glmexport.reference.reference import Reference
from glmexport.workflows.original import Original

PREFIX = (262, 263)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoint``, and ``bundle`` in full precision."""
    return tmp_path_factory.mktemp("answering")


@pytest.fixture(scope="module")
def model(place: Path) -> Any:
    return small_checkpoint(place / "checkpoint")


@pytest.fixture(scope="module")
def original(model: Any, place: Path) -> Original:
    return Original.open(str(place / "checkpoint"), Silent())


@pytest.fixture(scope="module")
def session(original: Original, place: Path) -> GenerationSession:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glmexport.workflows.build, "measure_and_report", lambda *_: None)
        build(place / "checkpoint", place / "bundle", "fp32")
    return GenerationSession.open(Bundle.open(place / "bundle"), THREADS)


def greedy(model: Any, prompt: Sequence[int], limit: int) -> list[int]:
    """One token a pass of transformers' whole model, without a cache; no end token counts."""
    answer: list[int] = []
    for _ in range(limit):
        with torch.inference_mode():
            answer.append(int(model(torch.tensor([[*prompt, *answer]])).logits[0, -1].argmax()))
    return answer


def prompts_of(original: Original, model: Any) -> list[Prompt]:
    """Prompts of several lengths; stop strings from the middle of an answer, one over two tokens, and none."""
    texts = ["What is it?", "a", "Once upon a time, in another land", "zzz", "12 34"]
    ids = [(*PREFIX, *original.tokenizer.encode(text)) for text in texts]
    decode = original.tokenizer.decode
    plain = [decode(greedy(model, each, 14)) for each in ids]
    stops: list[tuple[str, ...]] = [(), (plain[1][4:6],), ("never to be found", plain[2][9:10], plain[2][7:9]), ()]
    stops.append((plain[4][0],))
    return [
        Prompt(each, Ending(stop, limit)) for each, stop, limit in zip(ids, stops, [14, 14, 14, 1, 14], strict=True)
    ]


def expected_of(original: Original, model: Any, prompts: list[Prompt]) -> list[str]:
    """Generated to the limit, decoded, and cut by hand."""
    answers = []
    for prompt in prompts:
        tokens = greedy(model, prompt.ids, prompt.ending.max_tokens)
        ends = [place for place, token in enumerate(tokens) if token in original.architecture.eos_token_ids]
        text = original.tokenizer.decode(tokens[: min(ends, default=len(tokens))])
        answers.append(cut(text, prompt.ending.until))
    return answers


def cut(text: str, until: Sequence[str]) -> str:
    """Character by character, until one of the stop strings is there."""
    for count in range(len(text) + 1):
        there = [len(stop) for stop in until if text[:count].endswith(stop)]
        if there:
            return text[: count - max(there)]
    return text


def test_bundle_and_checkpoint_answer_as_token_by_token(
    original: Original, model: Any, session: GenerationSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(original, model)
    expected = expected_of(original, model, prompts)
    assert len(set(expected)) >= 4 and expected[4] == "" and 0 < len(expected[1]) < len(expected[0])
    tokenizer, ends = original.tokenizer, original.architecture.eos_token_ids
    reference = Reference(original.checkpoint, original.architecture)

    def wrong(prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        return iter([5] * max_tokens)

    assert streamed_answers(session.stream, tokenizer, session.ends, prompts, Silent()) == expected
    whole = whole_stream(original.checkpoint, ends)
    assert streamed_answers(whole, tokenizer, ends, prompts, Silent()) == expected
    for drafts in (None, session.stream, wrong):
        assert verified_texts(reference, tokenizer, prompts, tmp_path, Silent(), drafts) == expected
    # In several portions.
    monkeypatch.setattr(glmexport.lm_eval.answering, "TOKENS", 60)
    assert verified_texts(reference, tokenizer, prompts, tmp_path, Silent(), session.stream) == expected


def test_an_end_token_ends(original: Original, model: Any, tmp_path: Path) -> None:
    """One of the answer's own tokens taken for an end token, and for a stop string that is a special token."""
    prompt = Prompt((*PREFIX, 40, 50), Ending((), 14))
    tokens = greedy(model, prompt.ids, 14)
    end = tokens[5]
    expected = original.tokenizer.decode(tokens[: tokens.index(end)])
    stream = whole_stream(original.checkpoint, {end})
    assert streamed_answers(stream, original.tokenizer, {end}, [prompt], Silent()) == [expected]
    # The last token is the end token, and nothing is generated behind it.
    assert list(stream(prompt.ids, 14)) == tokens[: tokens.index(end) + 1]


def test_special_tokens_as_stop_strings(original: Original) -> None:
    user = original.tokenizer.special_tokens["<|user|>"]
    reading = Reading(original.tokenizer, [1], Ending(("<|user|>",), 9))
    tokens = [*original.tokenizer.encode("ab"), user, *original.tokenizer.encode("c")]
    assert [reading.finished(tokens[:count]) for count in range(4)] == [False, False, False, True]
    assert reading.text(tokens) == "ab"
    # Not among the stop strings it is left out, as in every text.
    assert Reading(original.tokenizer, [], Ending((), 9)).text(tokens) == "abc"


@given(st.text("abc", max_size=9), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings(original: Original, text: str, until: list[str]) -> None:
    """The same whether generation went on behind it or not."""
    reading = Reading(original.tokenizer, [], Ending(tuple(until), 9))
    tokens = original.tokenizer.encode(text)
    assert reading.text(tokens) == cut(text, until)
    stopped = next((count for count in range(len(tokens)) if reading.finished(tokens[:count])), len(tokens))
    assert reading.text(tokens[:stopped]) == cut(text, until)


@pytest.mark.parametrize(
    ("settings", "ending"),
    [
        ({}, Ending((), 99)),
        ({"until": "\n"}, Ending(("\n",), 99)),
        ({"until": ["a", "b"], "max_gen_toks": 7}, Ending(("a", "b"), 7)),
        ({"max_new_tokens": 7, "max_tokens": 7, "do_sample": False}, Ending((), 7)),
        ({"do_sample": False, "temperature": 0.8, "top_p": 0.9, "top_k": 5}, Ending((), 99)),
        ({"temperature": 0.0, "until": None, "do_sample": None}, Ending((), 99)),
        ({"num_beams": 1, "repetition_penalty": 1.0}, Ending((), 99)),
    ],
)
def test_settings(settings: dict[str, Any], ending: Ending) -> None:
    before = dict(settings)
    assert Ending.of(settings, 99) == ending
    assert settings == before


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0},
        {"temperature": 0.7},
        {"temperature": "hot"},
        {"num_beams": 4},
        {"repetition_penalty": 1.1},
        {"do_sample": False, "num_return_sequences": 2},
        {"presence_penalty": 0.5},
        {"until": [""]},
        {"until": 3},
        {"until": ["a", 3]},
        {"max_gen_toks": 0},
        {"max_gen_toks": "7"},
        {"max_gen_toks": [7]},
        {"max_gen_toks": True},
        {"max_gen_toks": 7, "max_tokens": 8},
    ],
)
def test_settings_that_ask_for_another_answer_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cannot be generated with") as caught:
        Ending.of(settings, 99)
    assert caught.value.next_step


def test_prompts_are_cut_from_the_left_behind_the_prefix() -> None:
    prompt = Prompt((1, 2, 10, 11, 12), Ending((), 4))
    assert prompt.fitted([1, 2], 9) is prompt
    assert prompt.fitted([1, 2], 8).ids == (1, 2, 11, 12)
    assert prompt.fitted([1, 2], 7).ids == (1, 2, 12)
    assert prompt.fitted([9], 6).ids == (11, 12)
    for prefix, window in (([1, 2], 6), ([], 4)):
        with pytest.raises(InputError, match=f"4 tokens leaves no room in a context of {window}"):
            prompt.fitted(prefix, window)


def test_what_followed_before_is_looked_up() -> None:
    assert looked_up([1, 2, 3, 4, 5, 1, 2, 3]) == [4, 5, 1, 2, 3]
    # Three tokens before two, and the last time before the first.
    assert looked_up([7, 1, 2, 3, 8, 1, 2, 9, 7, 1, 2])[:2] == [3, 8]
    assert looked_up([1, 5, 1, 6, 1])[:1] == [6]
    assert looked_up([1, 2, 3]) == looked_up([1]) == looked_up([]) == []


@given(st.lists(st.integers(0, 3), max_size=30))
def test_what_is_looked_up_stands_in_the_text(text: list[int]) -> None:
    found = looked_up(text)
    assert bool(found) == (text[-1:] != [] and text[-1] in text[:-1])
    assert any(text[start : start + len(found)] == found for start in range(len(text))) or not found


def test_what_fits_in_memory(original: Original, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits_in_memory(original.checkpoint)

    class Full:
        available = 1 << 20

    monkeypatch.setattr(glmexport.lm_eval.answering.psutil, "virtual_memory", Full)
    assert not fits_in_memory(original.checkpoint)
