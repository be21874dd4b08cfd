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
from models import TINY, write_checkpoint

from glmexport.foundation.progress import Silent
from glmexport.reference import reference as module
from glmexport.reference.reference import Reference
from glmexport.validation.behaviour import original
from glmexport.validation.behaviour.drafting import FREE, DraftCost
from glmexport.validation.behaviour.original import (
    Draft,
    VerifiedAnswers,
    accepted,
    one_at_a_time,
    verified_answers,
)
from glmexport.validation.behaviour.suffixes import PastFile, Suffix, SuffixStream, batches, kept_bytes
from glmexport.validation.reference import pass_blocks, reference_states
from glmexport.validation.texts import EvaluationText
from glmexport.workflows.original import Original

PROMPTS = [[262, 263, 40, 50], [262, 263], [262, 263, *range(60, 80)], [262, 263, 5, 5, 5]]
LIMITS = [12, 7, 9, 1]


@pytest.fixture(scope="module")
def reference(sample: Sample) -> Reference:
    opened = Original.open(str(sample.checkpoint), Silent())
    return Reference(opened.checkpoint, opened.architecture)


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


def ask(reference: Reference, draft: Draft, scratch: Path, ends: set[int] | None = None) -> VerifiedAnswers:
    return verified_answers(
        reference, PROMPTS, one_at_a_time(draft), limits=LIMITS, ends=ends or set(), scratch=scratch, progress=Silent()
    )


def tokens_of(answers: list[list[int]]) -> int:
    return sum(map(len, PROMPTS)) + sum(map(len, answers))


def test_right_drafts_take_one_pass(reference: Reference, expected: list[list[int]], tmp_path: Path) -> None:
    # A draft may be longer than the answer.
    found = ask(reference, lambda index, so_far, most: [*expected[index][len(so_far) :], 1, 2], tmp_path)
    assert (found.tokens, found.passes, found.needed) == (expected, 1, tokens_of(expected))
    # The last token of an answer says nothing of it.
    assert found.computed == found.needed - len(PROMPTS)
    assert not list(tmp_path.iterdir())


def test_no_drafts_take_a_pass_a_token(reference: Reference, expected: list[list[int]], tmp_path: Path) -> None:
    found = ask(reference, lambda *_: [], tmp_path)
    assert (found.tokens, found.passes) == (expected, max(LIMITS))
    assert found.computed == found.needed - len(PROMPTS)


def test_behind_a_refused_token_a_draft_has_to_be_worth_its_cost(
    reference: Reference, expected: list[list[int]], tmp_path: Path
) -> None:
    """Every first draft is wrong at its second token."""

    def found(cost: DraftCost) -> tuple[VerifiedAnswers, int]:
        again = []

        def draft(index: int, so_far: list[int], most: int) -> list[int]:
            again.append(bool(so_far))
            right = expected[index]
            return right[len(so_far) :] if so_far else [right[0], *(token + 1 for token in right[1:])]

        answers = verified_answers(
            reference,
            PROMPTS,
            one_at_a_time(draft),
            limits=LIMITS,
            ends=set(),
            scratch=tmp_path,
            progress=Silent(),
            cost=cost,
        )
        return answers, sum(again)

    (free, drafted), (dear, never) = found(FREE), found(DraftCost(token=1e6))
    assert free.tokens == dear.tokens == expected
    assert drafted == 3 and never == 0
    # Two tokens are gained by the first pass, and one by each that follows.
    assert free.passes < dear.passes == max(LIMITS) - 1


def test_drafts_that_are_wrong_now_and_then(reference: Reference, expected: list[list[int]], tmp_path: Path) -> None:
    wrong = random.Random(0)

    def draft(index: int, so_far: list[int], most: int) -> list[int]:
        rest = expected[index][len(so_far) :]
        return [token if wrong.random() < 0.8 else wrong.randrange(256) for token in rest][: wrong.randrange(9)]

    found = ask(reference, draft, tmp_path)
    assert found.tokens == expected and 1 < found.passes <= max(LIMITS)
    assert found.needed - len(PROMPTS) < found.computed < 1.3 * found.needed


def test_answers_that_find_no_space_are_computed_anew(
    reference: Reference, expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Space for the first two, of which one and a half answers are seen after the first pass."""
    token = kept_bytes(reference.architecture)
    room = len(PROMPTS[0]) + LIMITS[0] + len(PROMPTS[1]) + LIMITS[1]
    monkeypatch.setattr(original, "free_bytes", lambda _: 2 * (room * token))
    progress = Silent()
    found = verified_answers(
        reference,
        PROMPTS,
        one_at_a_time(lambda *_: []),
        limits=LIMITS,
        ends=set(),
        scratch=tmp_path,
        progress=progress,
    )
    assert found.tokens == expected and found.unkept == 2
    assert any("2 of 4 answers" in remark for remark in progress.remarks)
    kept = sum(len(PROMPTS[index]) + LIMITS[index] - 1 for index in (0, 1))
    anew = sum(len(PROMPTS[index]) + count for index in (2, 3) for count in range(LIMITS[index]))
    assert found.computed == kept + anew


def test_answers_end_with_an_end_token(reference: Reference, sample: Sample, tmp_path: Path) -> None:
    plain = greedy(sample.model, PROMPTS[0], LIMITS[0], set())
    ends = {plain[4]}
    ended = [greedy(sample.model, prompt, limit, ends) for prompt, limit in zip(PROMPTS, LIMITS, strict=True)]
    assert ended[0] == plain[: plain.index(plain[4]) + 1]
    for draft in (lambda *_: [], lambda index, so_far, most: [*ended[index][len(so_far) :], 3, 4]):
        assert ask(reference, draft, tmp_path, ends).tokens == ended


#: Scores of few heads are often 0 for several tokens, of which an indexer selects others in a text of another length.
FAMILIES = TINY | {"glm_moe_dsa": TINY["glm_moe_dsa"] | {"index_n_heads": 32}}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_transformers_generates(family: str, tmp_path: Path) -> None:
    """Behind pasts of other lengths, and of more tokens than an indexer selects."""
    model = write_checkpoint(tmp_path / "checkpoint", family, **FAMILIES[family])
    opened = Original.open(str(tmp_path / "checkpoint"), Silent())
    reference = Reference(opened.checkpoint, opened.architecture)
    expected = []
    for prompt, limit in zip(PROMPTS, LIMITS, strict=True):
        ids = torch.tensor([prompt])
        given = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, eos_token_id=None
        )
        expected.append(given[0, len(prompt) :].tolist())
    wrong = random.Random(0)

    def draft(index: int, so_far: list[int], most: int) -> list[int]:
        rest = expected[index][len(so_far) :]
        return [token if wrong.random() < 0.7 else wrong.randrange(256) for token in rest][:most]

    (tmp_path / "scratch").mkdir()
    for drafts in (draft, lambda *_: []):
        assert ask(reference, drafts, tmp_path / "scratch").tokens == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_suffix_is_what_the_whole_text_gives(family: str, tmp_path: Path) -> None:
    """Hidden states behind kept tokens, some of which are void again as a draft was refused."""
    write_checkpoint(tmp_path / "checkpoint", family, **FAMILIES[family])
    opened = Original.open(str(tmp_path / "checkpoint"), Silent())
    reference = Reference(opened.checkpoint, opened.architecture)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 250, (length,), generator=generator).tolist() for length in (40, 9, 23, 36)]
    past = PastFile(opened.architecture, [60] * 4, tmp_path)
    kept = [0, 0, 0, 0]
    for behind in ([30, 4, 1, 18], [35, 9, 15, 23], [40, 9, 20, 28], [40, 9, 20, 36]):
        suffixes = [
            Suffix(index, kept[index], text[kept[index] : end])
            for index, (text, end) in enumerate(zip(texts, behind, strict=True))
            if end > kept[index]
        ]
        # Tokens that are refused.
        given = [Suffix(each.index, each.start, [*each.tokens, 7, 7, 7]) for each in suffixes]
        stream = SuffixStream(reference, given, past, tmp_path)
        stream.states.embed(reference)
        pass_blocks(reference, [stream], Silent(), "")
        whole = reference_states(
            reference,
            [
                EvaluationText("", "", torch.tensor([*texts[each.index][: each.start], *each.tokens]), 1)
                for each in given
            ],
            tmp_path,
            Silent(),
        )
        for place, each in enumerate(given):
            logits = reference.logits(reference.final_norm(stream.states.load(place)))
            expected = reference.logits(whole.load(place)[:, each.start :])
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        for each in suffixes:
            kept[each.index] += len(each.tokens)


def test_batches_are_of_one_length_and_fit_into_memory() -> None:
    sizes = [(0, 3), (40, 2), (20, 2), (45, 2), (48, 2), (0, 200), (30, 2)]
    suffixes = [Suffix(index, start, [1] * count) for index, (start, count) in enumerate(sizes)]
    assert list(batches(suffixes, 100)) == [[2, 6], [1, 3], [4], [0], [5]]
    assert list(batches([], 100)) == []


def test_the_likeliest_token_is_that_of_the_highest_logit(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLAB_ROWS", 50)
    monkeypatch.setattr(module, "_ROWS", 3)
    normed = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    found = reference.likeliest([normed, torch.zeros(2, 128)])
    assert torch.equal(found[0], reference.logits(normed).argmax(-1))
    assert found[1].tolist() == [0, 0]


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
