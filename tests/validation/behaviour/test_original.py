"""The original's own answers: token by token the same as greedy decoding, whatever is drafted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import Sample
from hypothesis import given
from hypothesis import strategies as st

from glmexport.foundation.progress import Silent
from glmexport.reference.reference import Reference
from glmexport.validation.behaviour.original import Draft, accepted, verified_answers
from glmexport.workflows.original import Original

PROMPTS = [[262, 263, 40, 50], [262, 263], [262, 263, *range(60, 80)], [262, 263, 5, 5, 5]]
LIMITS = [12, 7, 9, 1]


@pytest.fixture(scope="module")
def reference(sample: Sample) -> Reference:
    original = Original.open(str(sample.checkpoint), Silent())
    return Reference(original.checkpoint, original.architecture)


def greedy(model: Any, prompt: list[int], limit: int, ends: set[int]) -> list[int]:
    """One token a pass of transformers' whole model."""
    answer: list[int] = []
    while len(answer) < limit and not (answer and answer[-1] in ends):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, -1]
        answer.append(int(logits.argmax()))
    return answer


@pytest.fixture(scope="module")
def expected(sample: Sample) -> list[list[int]]:
    return [greedy(sample.model, prompt, limit, set()) for prompt, limit in zip(PROMPTS, LIMITS, strict=True)]


def ask(reference: Reference, draft: Draft, scratch: Path, ends: set[int] | None = None) -> tuple[list[list[int]], int]:
    return verified_answers(
        reference, PROMPTS, draft, limits=LIMITS, ends=ends or set(), scratch=scratch, progress=Silent()
    )


def test_right_drafts_take_one_pass(reference: Reference, expected: list[list[int]], tmp_path: Path) -> None:
    # A draft may be longer than the answer.
    found, passes = ask(reference, lambda index, so_far: [*expected[index][len(so_far) :], 1, 2], tmp_path)
    assert (found, passes) == (expected, 1)


def test_no_drafts_take_a_pass_a_token(reference: Reference, expected: list[list[int]], tmp_path: Path) -> None:
    assert ask(reference, lambda *_: [], tmp_path) == (expected, max(LIMITS))


def test_drafts_that_are_wrong_now_and_then(reference: Reference, expected: list[list[int]], tmp_path: Path) -> None:
    wrong = random.Random(0)

    def draft(index: int, so_far: list[int]) -> list[int]:
        rest = expected[index][len(so_far) :]
        return [token if wrong.random() < 0.8 else wrong.randrange(256) for token in rest][: wrong.randrange(9)]

    found, passes = ask(reference, draft, tmp_path)
    assert found == expected and 1 < passes <= max(LIMITS)


def test_answers_end_with_an_end_token(reference: Reference, sample: Sample, tmp_path: Path) -> None:
    plain = greedy(sample.model, PROMPTS[0], LIMITS[0], set())
    ends = {plain[4]}
    ended = [greedy(sample.model, prompt, limit, ends) for prompt, limit in zip(PROMPTS, LIMITS, strict=True)]
    assert ended[0] == plain[: plain.index(plain[4]) + 1]
    for draft in (lambda *_: [], lambda index, so_far: [*ended[index][len(so_far) :], 3, 4]):
        assert ask(reference, draft, tmp_path, ends)[0] == ended


TOKENS = st.integers(0, 2)


@given(st.data())
def test_any_draft_is_accepted_up_to_what_was_wanted(data: st.DataObject) -> None:
    """Of a model that wants a fixed next token after every count of tokens, with every length, limit and end."""
    truth = data.draw(st.lists(TOKENS, min_size=1, max_size=12))
    ends = data.draw(st.sets(TOKENS, max_size=1))
    limit = data.draw(st.integers(1, len(truth)))
    naive: list[int] = []
    while len(naive) < limit and not (naive and naive[-1] in ends):
        naive.append(truth[len(naive)])
    answer: list[int] = []
    while len(answer) < limit and not (answer and answer[-1] in ends):
        room = limit - len(answer)
        draft = data.draw(st.lists(TOKENS, max_size=room))
        # What the model says behind a wrong token is about another text.
        wanted = [*truth[len(answer) :], 0][: len(draft) + 1]
        differs = next((i for i, (a, b) in enumerate(zip(draft, wanted, strict=False)) if a != b), len(draft))
        wanted = [*wanted[: differs + 1], *data.draw(st.lists(TOKENS, min_size=len(draft), max_size=len(draft)))]
        before = len(answer)
        answer += accepted(draft, wanted[: len(draft) + 1], ends, limit - len(answer))
        assert len(answer) > before and answer == naive[: len(answer)]
    assert answer == naive
