"""Answers that were made up, and what is told of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import pytest
import torch
from builds import Sample

from glmexport.calibration.corpus import shipped_documents
from glmexport.foundation.errors import InputError
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.behaviour.choices import choice_scores, choice_texts
from glmexport.validation.behaviour.measure import Answers, judge
from glmexport.validation.behaviour.plane import BundleSessions, ask
from glmexport.validation.behaviour.questions import Kind, Question, questions, some_of_each_kind, task_prompt
from glmexport.validation.behaviour.tasks import Task
from glmexport.validation.conditions import BehaviourPlan

END = 999
ENGLISH = "The weather is fine today, and everybody is going out for a long walk in the park beside the river."
GERMAN = "Das Wetter ist heute schön, und alle gehen hinaus auf einen langen Spaziergang im Park neben dem Fluss."
CALL = "search_articles<arg_key>subject</arg_key><arg_value>rain</arg_value></tool_call>"


@pytest.fixture
def tokenizer(sample: Sample) -> Tokenizer:
    return Tokenizer.open(sample.checkpoint)


def question(id_: str, kind: Kind = "continue", language: str | None = "en", **fields: object) -> Question:
    return Question.model_validate(
        {"id": id_, "kind": kind, "language": language, "ids": [1, 2], "max_tokens": 99, **fields}
    )


def answers(original: Sequence[list[int]], bundle: Sequence[list[int]], **fields: object) -> Answers:
    return Answers(original, bundle, {END}, 1, **fields)  # type: ignore[arg-type]


def test_counts(tokenizer: Tokenizer) -> None:
    english, german = tokenizer.encode(ENGLISH), tokenizer.encode(GERMAN)
    asked = [question("a"), question("b"), question("c", language="de"), question("d", language="de"), question("e")]
    theirs = [[*english, END], [*english, END], german, [*english, END], [5, 6, 7, END]]
    ours = [[*english, END], german, [*german[:9], *[3] * 60], [*german, END], [5, 6, 8]]
    found = judge(asked, answers(theirs, ours), tokenizer)
    overall = found.overall
    assert (overall.answers, overall.identical, overall.ended_original, overall.ended_bundle) == (5, 1, 4, 2)
    assert (overall.loops_original, overall.loops_bundle) == (0, 1)
    assert (overall.tokens_original, overall.tokens_bundle) == tuple(sum(map(len, side)) for side in (theirs, ours))
    # Up to the first difference: all of the first; where b and d differ; nine; two.
    place = next(i for i, (x, y) in enumerate(zip(english, german, strict=False)) if x != y)
    assert overall.exact_prefix_p50 == sorted([len(english) + 1, place, 9, place, 2])[2]
    # a and b can be told. Of c too little prose is left, d's original is not in German itself, e is too short.
    assert (overall.drift_judged, overall.drifted) == (2, 1)
    assert [row.language for row in found.languages] == ["en", "de"]
    assert [row.answers for row in found.languages] == [3, 2]
    assert [(row.drift_judged, row.drifted) for row in found.languages] == [(2, 1), (0, 0)]
    assert (found.loops.tasks, found.loops.lost, found.loops.flips) == (5, 1, ("c",))
    assert (found.ended.lost, found.ended.gained, found.ended.flips) == (2, 0, ("b", "e"))
    assert found.drift is not None and (found.drift.tasks, found.drift.flips) == (2, ("b",))
    assert found.tool_calls is None and found.translation is None and found.concurrency is None and found.tasks == ()


def test_the_ratio_of_lengths_by_leaving_answers_out(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(0)
    before = random.integers(20, 60, 80)
    after = np.maximum(1, before + random.integers(-8, 12, 80))
    asked = [question(str(index)) for index in range(80)]
    found = judge(asked, answers([[1] * n for n in before], [[2] * n for n in after]), tokenizer)
    assert found.ln_length_ratio == pytest.approx(math.log(after.sum() / before.sum()))
    without = [
        math.log((after.sum() - after[i]) / (before.sum() - before[i])) for i in range(80)
    ]  # fmt: skip
    jackknife = math.sqrt(79 / 80 * np.square(np.array(without) - np.mean(without)).sum())
    assert found.ln_length_ratio_error == pytest.approx(jackknife, rel=0.03)


def test_the_ratio_of_two_answers_by_hand(tokenizer: Tokenizer) -> None:
    """Lengths 10 and 20 became 12 and 18: residuals 2 and -2 of the ratio 1, on 30 tokens."""
    found = judge([question("a"), question("b")], answers([[1] * 10, [1] * 20], [[1] * 12, [1] * 18]), tokenizer)
    assert found.ln_length_ratio == 0
    assert found.ln_length_ratio_error == pytest.approx(math.sqrt(2 * (4 + 4)) / 30)


def test_the_ratio_of_one_answer_has_no_error(tokenizer: Tokenizer) -> None:
    found = judge([question("a")], answers([[1] * 10], [[1] * 20]), tokenizer)
    assert found.ln_length_ratio == pytest.approx(math.log(2)) and math.isinf(found.ln_length_ratio_error)


def test_tool_calls(tokenizer: Tokenizer) -> None:
    good, bad = tokenizer.encode(CALL), tokenizer.encode(CALL.replace("</arg_value>", ""))
    asked = [question(name, "tools", lead="<tool_call>") for name in "abcd"]
    alone = {"a": bad, "b": good, "d": good}
    found = judge(asked, answers([good, good, bad, good], [good, bad, good, good], alone=alone, batch=2), tokenizer)
    # c counts for nobody: the original's own is no call.
    assert found.tool_calls is not None and found.tool_calls_together is not None
    assert (found.tool_calls.tasks, found.tool_calls.lost, found.tool_calls.flips) == (3, 1, ("a",))
    assert (found.tool_calls_together.tasks, found.tool_calls_together.flips) == (3, ("b",))
    assert found.concurrency is not None
    assert (found.concurrency.batch, found.concurrency.prompts, found.concurrency.identical) == (2, 3, 1)
    assert found.drift is None


def test_translations_and_tasks(tokenizer: Tokenizer) -> None:
    tasks = [
        Task(id="t1", name="sums", prompt="2+2=", metric="exact", target="4"),
        Task(id="t2", name="sums", prompt="3+3=", metric="exact", target="6"),
        Task(id="t3", name="sums", prompt="Sky:", metric="choice", choices=("blue", "red"), target="blue"),
    ]
    asked = [
        question("x", "translate", "de", expected="guten Morgen"),
        question("t1", "task", None),
        question("t2", "task", None),
    ]
    theirs = [tokenizer.encode(text) for text in ("guten Morgen", "4", "6")]
    ours = [tokenizer.encode(text) for text in ("guten Abend", "5", "6")]
    found = judge(asked, answers(theirs, ours), tokenizer, tasks, {"t3": (1.0, 0.0)})
    assert found.translation is not None and found.translation.tasks == 1 and found.translation.lost == 1
    (row,) = found.translations
    assert (row.language, row.sentences, row.chrf_original) == ("de", 1, 1) and 0 < row.chrf_bundle < 1
    exact, choice = found.tasks
    assert (exact.name, exact.metric, exact.original, exact.bundle) == ("sums", "exact", 1, 0.5)
    assert (exact.change.lost, exact.change.flips) == (1, ("t1",))
    assert (choice.metric, choice.original, choice.bundle, choice.change.flips) == ("choice", 1, 0, ("t3",))
    assert [row.language for row in found.languages] == ["de"]
    # The task that was lost comes first, though the translation differs earlier or later.
    assert [answer.id for answer in found.differences] == ["t1", "x"]
    assert (found.differences[0].score_original, found.differences[0].score_bundle) == (1, 0)


def test_differences_are_of_every_kind_and_language(tokenizer: Tokenizer) -> None:
    asked = [question(f"en{index}") for index in range(20)] + [question("de", language="de"), question("chat", "chat")]
    prefixes = [*range(20), 30, 25]
    theirs = [[7] * 40 for _ in asked]
    ours = [[7] * prefix + [8] * (40 - prefix) for prefix in prefixes]
    shown = judge(asked, answers(theirs, ours), tokenizer).differences
    assert [answer.id for answer in shown] == ["en0", "chat", "de", *(f"en{index}" for index in range(1, 10))]
    assert [answer.exact_prefix for answer in shown[:3]] == [0, 25, 30]
    assert judge(asked, answers(theirs, theirs), tokenizer).differences == ()


def test_questions_are_of_every_kind_that_the_tokenizer_can_ask(tokenizer: Tokenizer) -> None:
    documents = [document for document in shipped_documents("evaluation") if document.language in ("en", "zh")]
    found = questions(documents, tokenizer, each=3, translations=2, max_tokens=5)
    assert len({each.id for each in found}) == len(found)
    kinds = [(each.kind, each.language) for each in found]
    # The template knows nothing of tool calls.
    assert {kind for kind, _ in kinds} == {"continue", "chat", "translate"}
    assert kinds.count(("continue", "en")) == 3 and kinds.count(("chat", "zh")) == 1
    assert kinds.count(("translate", "zh")) == 2 and kinds.count(("translate", "en")) == 0
    assert all(len(each.ids) == 32 and each.ids[:2] == tokenizer.prefix for each in found if each.kind == "continue")
    for each in (each for each in found if each.kind == "translate"):
        text = tokenizer.decode(each.ids)
        assert "Translate into Chinese:\n" in text and each.expected and each.expected not in text


def test_some_questions_are_one_of_each_kind_first() -> None:
    kinds: list[Kind] = ["continue", "continue", "continue", "chat", "translate", "translate"]
    asked = [question(f"{language}{n}", kind, language) for language in ("en", "sw") for n, kind in enumerate(kinds)]

    def chosen(most: int) -> list[str]:
        return [each.id for each in some_of_each_kind(asked, most)]

    assert chosen(0) == [] and chosen(9) == [each.id for each in asked]
    assert chosen(1) == ["en0", "sw0"]
    assert chosen(4) == ["en0", "en1", "en3", "en4", "sw0", "sw1", "sw3", "sw4"]


def test_choices_are_scored_by_their_own_tokens(tokenizer: Tokenizer) -> None:
    """Of logits made up for the purpose: each byte of ``dark`` is likely in its place."""
    tasks = [
        Task(id="a", name="n", prompt="Sky: ", metric="choice", choices=("blue", "dark"), target="blue"),
        Task(id="free", name="n", prompt="Sky: ", metric="exact", target="blue"),
        Task(id="b", name="n", prompt="Grass: ", metric="choice", choices=("blue", "dark"), target=1),
    ]
    texts = choice_texts(tasks, tokenizer)
    assert [text.document for text in texts] == ["a", "a", "b", "b"]
    assert texts[0].ids.tolist() == [*task_prompt(tasks[0], tokenizer), *tokenizer.encode("blue")]
    assert texts[0].targets.tolist() == tokenizer.encode("blue")
    dark = tokenizer.encode("dark")

    def logits(index: int) -> torch.Tensor:
        rows = torch.zeros(texts[index].positions, tokenizer.vocabulary_size)
        rows[torch.arange(len(rows)), torch.tensor(dark[: len(rows)])] = 5.0
        return rows

    assert choice_scores(tasks, texts, logits) == {"a": 0, "b": 1}


def test_a_task_that_fills_the_context_is_refused_before_anything_is_opened(tokenizer: Tokenizer) -> None:
    def unopened(*_: object) -> NoReturn:
        raise AssertionError("opened")

    for settings in ({"metric": "exact", "target": "x"}, {"metric": "choice", "target": 0, "choices": ("x", "y")}):
        task = Task.model_validate({"id": "long", "name": "n", "prompt": "a" * 9, **settings})
        with pytest.raises(InputError, match=r"The task long has \d+ tokens and the context 8"):
            sessions = BundleSessions(unopened, unopened, batches=True, tokenizer=tokenizer, context_length=8)
            ask([], [task], sessions, None, plan=BehaviourPlan(), scratch=None, progress=None)  # type: ignore[arg-type]
