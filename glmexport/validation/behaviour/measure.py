"""Figures of behaviour, made of the questions and the answers of both models."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from glmexport.chat.tool_calls import parse
from glmexport.engine.generation import GenerationSession
from glmexport.foundation.progress import Progress
from glmexport.quantization.ranks import Parcel
from glmexport.results.behaviour import Answer, Behaviour, Concurrency, LanguageBehaviour, TaskGroup, Translation
from glmexport.results.paired import Paired
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.behaviour.drift import detect_language, has_drifted, knows_language, primary_language
from glmexport.validation.behaviour.loops import find_loop
from glmexport.validation.behaviour.paired import compare_paired
from glmexport.validation.behaviour.questions import TOOLS, Question
from glmexport.validation.behaviour.tasks import Task, chrf, score
from glmexport.validation.pieces import UNKEPT, Pieces

_SHOWN = 12
_PROMPT_TOKENS = 40


@dataclass(frozen=True)
class JudgedAnswer:
    """One question with the answers of both, and what each is worth."""

    question: Question
    original: list[int]
    bundle: list[int]
    texts: tuple[str, str]
    #: Scores of the answers; None where nothing is expected.
    scores: tuple[float, float] | None
    #: Whether the language drifted. None: it cannot be told, or the original's own is not in the language that was
    #: asked for.
    drifted: bool | None

    @property
    def prefix(self) -> int:
        """The number of tokens up to the first difference."""
        pairs = zip(self.original, self.bundle, strict=False)
        shorter = min(len(self.original), len(self.bundle))
        return next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)


@dataclass(frozen=True)
class Answers:
    """Answers of both models to the same questions, and how they came about."""

    original: Sequence[list[int]]
    bundle: Sequence[list[int]]
    ends: Collection[int]
    #: Number of passes through the original.
    passes: int
    #: Number of the bundle's answers that were computed together; 0: each alone.
    batch: int = 0
    #: The bundle's answers, by question's id, to those that were asked alone too.
    alone: Mapping[str, list[int]] = field(default_factory=dict)
    #: Number of tokens that the original computed in all passes, number of its prompts and answers, and number of
    #: answers that were computed anew in every pass.
    tokens_computed: int = 0
    tokens_needed: int = 0
    recomputed: int = 0

    def ended(self, tokens: list[int]) -> bool:
        """Return whether an answer comes to an end."""
        return bool(tokens) and tokens[-1] in self.ends

    def text(self, question: Question, tokens: list[int], tokenizer: Tokenizer) -> str:
        """Return the text of an answer without its end token, but with the special tokens of tool calls."""
        kept = tokens[:-1] if self.ended(tokens) else tokens
        return question.lead + tokenizer.decode(kept, skip_special=question.kind != "tools")


def bundle_answers(
    session: GenerationSession,
    questions: Sequence[Question],
    batch: int,
    progress: Progress,
    pieces: Pieces = UNKEPT,
    *,
    label: str = "Bundle's answers",
) -> list[list[int]]:
    """Return the bundle's answers, each with its end token, if it comes.

    So many at a time are computed together as ``batch`` says, of prompts of like lengths; 0: each alone. Which ones are
    is decided beforehand, as an answer may depend on the others by rounding.
    """
    size = max(1, batch)
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].ids))
    batches = [order[start : start + size] for start in range(0, len(order), size)]

    def compute(absent: Sequence[int]) -> Iterator[tuple[int, Parcel]]:
        with progress.track(label, sum(len(batches[number]) for number in absent)) as track:
            for number in absent:
                asked = [questions[index] for index in batches[number]]
                found = session.together([each.ids for each in asked], [each.max_tokens for each in asked])
                yield number, Parcel(facts=found)
                track.advance(len(asked), asked[0].language or "")

    names = [[batch, *(_name(questions[index]) for index in indices)] for indices in batches]
    answers: list[list[int]] = [[] for _ in questions]
    for indices, parcel in zip(batches, pieces.each("bundle-answers", names, compute), strict=True):
        for index, answer in zip(indices, parcel.facts, strict=True):
            answers[index] = answer
    return answers


def asked_alone(questions: Sequence[Question], every: int) -> list[Question]:
    """Return every so-many-th of ``questions``, and each that asks for a tool call."""
    return [question for place, question in enumerate(questions)
            if question.kind == "tools" or place % every == 0]  # fmt: skip


def _name(question: Question) -> list[Any]:
    """Return what an answer depends on."""
    return [question.ids, question.max_tokens]


def judge(
    questions: Sequence[Question],
    answers: Answers,
    tokenizer: Tokenizer,
    tasks: Sequence[Task] = (),
    choices: Mapping[str, tuple[float, float]] | None = None,
) -> Behaviour:
    """Compare the answers, question by question.

    ``tasks`` of the user's that ``questions`` ask by their ids; ``choices``: scores of those that are no questions.
    """
    asked = {task.id: task for task in tasks}
    judged = [
        _judged(question, theirs, ours, answers, tokenizer, asked.get(question.id))
        for question, theirs, ours in zip(questions, answers.original, answers.bundle, strict=True)
    ]

    def compare(chosen: Sequence[JudgedAnswer], before: Sequence[float], after: Sequence[float]) -> Paired:
        return compare_paired(before, after, ids=[each.question.id for each in chosen])

    def called_alone(each: JudgedAnswer) -> bool:
        alone = answers.alone.get(each.question.id, each.bundle)
        return _called(answers.text(each.question, alone, tokenizer))

    told = [each for each in judged if each.drifted is not None]
    calls = [each for each in judged if each.question.kind == "tools" and _called(each.texts[0])]
    sentences = [each for each in judged if each.question.kind == "translate" and each.scores]
    scores = [each.scores for each in sentences if each.scores]
    ratio, error = _length_ratio(judged)
    languages = dict.fromkeys(each.question.language for each in judged if each.question.language)
    return Behaviour(
        passes=answers.passes,
        tokens_computed=answers.tokens_computed,
        tokens_needed=answers.tokens_needed,
        answers_recomputed=answers.recomputed,
        languages=tuple(
            _summary(name, [each for each in judged if each.question.language == name], answers) for name in languages
        ),
        overall=_summary("all", judged, answers),
        ln_length_ratio=ratio,
        ln_length_ratio_error=error,
        loops=compare(
            judged, [not find_loop(each.original) for each in judged], [not find_loop(each.bundle) for each in judged]
        ),
        ended=compare(
            judged, *([answers.ended(tokens) for tokens in side] for side in (answers.original, answers.bundle))
        ),
        drift=compare(told, [1] * len(told), [not each.drifted for each in told]) if told else None,
        tool_calls=compare(calls, [1] * len(calls), [called_alone(each) for each in calls]) if calls else None,
        tool_calls_together=compare(calls, [1] * len(calls), [_called(each.texts[1]) for each in calls])
        if calls and answers.batch
        else None,
        translation=compare(sentences, *map(list, zip(*scores, strict=True))) if sentences else None,
        translations=tuple(
            _translation(name, [score for each, score in zip(sentences, scores, strict=True)
                                if each.question.language == name])
            for name in dict.fromkeys(each.question.language for each in sentences) if name
        ),
        tasks=_groups(tasks, {each.question.id: each.scores for each in judged if each.scores} | dict(choices or {})),
        concurrency=_concurrency(judged, answers) if answers.alone else None,
        differences=_differences(judged, tokenizer),
    )  # fmt: skip


def _judged(
    question: Question, theirs: list[int], ours: list[int], answers: Answers, tokenizer: Tokenizer, task: Task | None
) -> JudgedAnswer:
    before, after = (answers.text(question, tokens, tokenizer) for tokens in (theirs, ours))
    scores = None
    if task:
        scores = score(task, before), score(task, after)
    elif question.expected is not None:
        scores = chrf(before, [question.expected]), chrf(after, [question.expected])
    return JudgedAnswer(question, theirs, ours, (before, after), scores, _moved(question, before, after))


def _moved(question: Question, before: str, after: str) -> bool | None:
    """Return whether a language was lost; None if the original itself answers in another than it was asked in."""
    if question.kind == "tools":
        return None
    original = detect_language(before)
    asked = question.language
    if original is None or (asked and knows_language(asked) and original.tag != primary_language(asked)):
        return None
    return has_drifted(asked, original, detect_language(after))


def _groups(tasks: Sequence[Task], scores: Mapping[str, tuple[float, float]]) -> tuple[TaskGroup, ...]:
    groups = []
    for name, metric in dict.fromkeys((task.name, task.metric) for task in tasks):
        chosen = [task.id for task in tasks if (task.name, task.metric) == (name, metric)]
        before, after = (list(side) for side in zip(*(scores[id_] for id_ in chosen), strict=True))
        groups.append(
            TaskGroup(
                name=name,
                metric=metric,
                original=float(np.mean(before)),
                bundle=float(np.mean(after)),
                change=compare_paired(before, after, ids=chosen),
            )
        )
    return tuple(groups)


def _called(text: str) -> bool:
    """Whether an answer has a call, and nothing wrong with any."""
    parsed = parse(text, TOOLS)
    return bool(parsed.calls) and not parsed.faults


def _length_ratio(judged: Sequence[JudgedAnswer]) -> tuple[float, float]:
    """Ln of a ratio of sums, and its error by linearization (Cochran, Sampling Techniques, 1977, section 6)."""
    before = np.array([len(each.original) for each in judged], np.float64)
    after = np.array([len(each.bundle) for each in judged], np.float64)
    ratio = after.sum() / before.sum()
    count = len(judged)
    if count == 1:
        return math.log(ratio), math.inf
    spread = math.sqrt(float(np.square(after - ratio * before).sum()) * count / (count - 1))
    return math.log(ratio), spread / float(after.sum())


def _summary(name: str, judged: Sequence[JudgedAnswer], answers: Answers) -> LanguageBehaviour:
    return LanguageBehaviour(
        language=name,
        answers=len(judged),
        identical=sum(each.original == each.bundle for each in judged),
        exact_prefix_p50=median(each.prefix for each in judged),
        tokens_original=sum(len(each.original) for each in judged),
        tokens_bundle=sum(len(each.bundle) for each in judged),
        ended_original=sum(answers.ended(each.original) for each in judged),
        ended_bundle=sum(answers.ended(each.bundle) for each in judged),
        loops_original=sum(find_loop(each.original) is not None for each in judged),
        loops_bundle=sum(find_loop(each.bundle) is not None for each in judged),
        drift_judged=sum(each.drifted is not None for each in judged),
        drifted=sum(each.drifted is True for each in judged),
    )


def _translation(name: str, scores: Sequence[tuple[float, ...]]) -> Translation:
    before, after = np.mean(scores, 0)
    return Translation(language=name, sentences=len(scores), chrf_original=float(before), chrf_bundle=float(after))


def _concurrency(judged: Sequence[JudgedAnswer], answers: Answers) -> Concurrency:
    same = sum(each.bundle == answers.alone.get(each.question.id) for each in judged)
    return Concurrency(batch=answers.batch, prompts=len(answers.alone), identical=same)


def _differences(judged: Sequence[JudgedAnswer], tokenizer: Tokenizer) -> tuple[Answer, ...]:
    """Tasks whose score fell, then the earliest differences, one a kind and language before a second of any."""
    seen: dict[tuple[str, str | None], int] = {}
    ranked = []
    for each in sorted((each for each in judged if each.original != each.bundle), key=lambda each: each.prefix):
        group = (each.question.kind, each.question.language)
        seen[group] = seen.get(group, 0) + 1
        fell = each.question.kind == "task" and each.scores is not None and each.scores[1] < each.scores[0]
        ranked.append((not fell, seen[group], each.prefix, each))
    ranked.sort(key=lambda entry: entry[:3])
    return tuple(
        Answer(
            id=each.question.id,
            kind=each.question.kind,
            language=each.question.language,
            prompt=tokenizer.decode(each.question.ids[-_PROMPT_TOKENS:]),
            original=each.texts[0],
            bundle=each.texts[1],
            exact_prefix=each.prefix,
            score_original=each.scores[0] if each.scores else None,
            score_bundle=each.scores[1] if each.scores else None,
        )
        for *_, each in ranked[:_SHOWN]
    )
