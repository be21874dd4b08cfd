"""Records of what both models answer when nobody leads them token by token."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from glmexport.foundation.definition import Count, Number
from glmexport.results.paired import Paired
from glmexport.results.record import Record

Kind = Literal["continue", "chat", "tools", "translate", "task"]


class Answer(Record):
    """One prompt, and the answers of both models to it."""

    id: str
    kind: Kind
    language: str | None
    """BCP-47 tag that the answer should be in; none if nobody says."""
    prompt: str
    """The end of the prompt that both were given."""
    original: str
    bundle: str
    exact_prefix: Count
    """Number of tokens up to the first difference."""
    score_original: Number | None = None
    """Score of the original's answer to a translation or task, 0 to 1; None for other prompts."""
    score_bundle: Number | None = None

    @model_validator(mode="after")
    def _both_are_scored_or_none(self) -> Self:
        if (self.score_original is None) != (self.score_bundle is None):
            raise ValueError("give the scores of both answers, or of none")
        return self


class LanguageBehaviour(Record):
    """Figures of the answers in one language."""

    language: str
    """BCP-47 tag; "all" for every language together."""
    answers: Count
    identical: Count
    exact_prefix_p50: Number
    """Median number of tokens up to the first difference; an answer that has none counts with its length."""
    tokens_original: Count
    tokens_bundle: Count
    ended_original: Count
    """Answers that came to an end by themselves."""
    ended_bundle: Count
    loops_original: Count
    """Answers that end in the repetition of one block."""
    loops_bundle: Count
    drift_judged: Count
    """Answers long enough to tell their language, where the original's is in the one that was asked for."""
    drifted: Count
    """Answers among these that are in another language."""


class Translation(Record):
    """Figures of the sentences translated from English."""

    language: str
    sentences: Count
    chrf_original: Number
    """Mean chrF against a translation by people, 0 to 1 (Popović, WMT 2015)."""
    chrf_bundle: Number


class Concurrency(Record):
    """Figures of prompts answered in a batch with others, and alone."""

    batch: Count
    """Prompts answered at a time."""
    prompts: Count
    """Prompts that were asked alone too: some of all, and each that asks for a tool call."""
    identical: Count


class TaskGroup(Record):
    """Figures of the user's tasks of one name and metric."""

    name: str
    metric: Literal["exact", "choice", "regex", "chrf"]
    original: Number
    """Mean score, 0 to 1."""
    bundle: Number
    change: Paired


class Behaviour(Record):
    """The greedy answers of the bundle, in batches where its loop computes answers together, and the original's own."""

    passes: Count
    """Passes through the original that its answers took; 0 where they were captured."""
    tokens_computed: Count = 0
    """Tokens that these passes computed, all together."""
    tokens_needed: Count = 0
    """Tokens of all prompts and of the original's answers, each counted once."""
    answers_recomputed: Count = 0
    """Answers whose whole text every pass computed, as the disk had no space for their keys and values."""
    languages: tuple[LanguageBehaviour, ...]
    overall: LanguageBehaviour
    ln_length_ratio: Number
    """The logarithm ln(tokens of all answers of the bundle / of the original)."""
    ln_length_ratio_error: Number
    """Standard error of ``ln_length_ratio``, with prompts as the sample."""
    loops: Paired
    """Scores of not looping: 1 for an answer that does not end in a loop."""
    ended: Paired
    """Scores of ending: 1 for an answer that comes to an end."""
    drift: Paired | None
    """Scores of keeping the language: 1 for an answer in the language that was asked for, or as the original's if that
    is not known to the detector; of those that the original answers so. None where no language could be told."""
    tool_calls: Paired | None
    """Scores of calling tools: 1 for an answer that is a well-formed call of a known tool, of those where the
    original's is; of the bundle alone. None without any."""
    tool_calls_together: Paired | None
    """Scores of calling tools, like ``tool_calls``, with the bundle answering in a batch."""
    translation: Paired | None
    """Scores of translating: the chrF of each sentence."""
    translations: tuple[Translation, ...]
    tasks: tuple[TaskGroup, ...]
    concurrency: Concurrency | None
    differences: tuple[Answer, ...]
    """Some of the answers that differ, of every kind and language."""
