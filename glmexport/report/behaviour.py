"""Rows of the section on free answers, as every rendering shows them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from rich.cells import split_graphemes

from glmexport.foundation.languages import language_name
from glmexport.report import text

if TYPE_CHECKING:
    from glmexport.results.behaviour import Answer, Behaviour, LanguageBehaviour
    from glmexport.results.paired import Paired

_KINDS = {
    "continue": "Text to go on with",
    "chat": "Question",
    "tools": "Tool call",
    "translate": "Translation",
    "task": "Task",
}


@dataclass(frozen=True)
class AnswerRow:
    """One quantity of all answers, the original's beside the bundle's."""

    name: str
    original: str
    bundle: str
    note: str = ""


def answer_rows(behaviour: Behaviour) -> list[AnswerRow]:
    """Return the rows about all answers together."""
    overall = behaviour.overall
    rows = [
        AnswerRow(
            "Same answer",
            "",
            f"{text.number(overall.identical)} of {text.number(overall.answers)}",
            f"half of them are the same for {text.number(overall.exact_prefix_p50)} tokens or longer",
        ),
        AnswerRow(
            "Tokens of all answers",
            text.number(overall.tokens_original),
            text.number(overall.tokens_bundle),
            f"{text.ratio(_exponential(behaviour.ln_length_ratio))} the length",
        ),
        AnswerRow(
            "Answers that came to an end",
            text.number(overall.ended_original),
            text.number(overall.ended_bundle),
            _changed(behaviour.ended),
        ),
        AnswerRow(
            "Answers that end in a loop",
            text.number(overall.loops_original),
            text.number(overall.loops_bundle),
            _changed(behaviour.loops),
        ),
    ]
    if behaviour.drift is not None:
        rows.append(_kept("Answers in the original's language", behaviour.drift))
    if behaviour.tool_calls is not None:
        rows.append(_kept("Well-formed tool calls", behaviour.tool_calls))
    if behaviour.tool_calls_together is not None:
        rows.append(_kept("Well-formed tool calls, in a batch", behaviour.tool_calls_together))
    if behaviour.translation is not None and behaviour.translations:
        sentences = [row.sentences for row in behaviour.translations]
        before, after = (
            sum(getattr(row, side) * row.sentences for row in behaviour.translations) / sum(sentences)
            for side in ("chrf_original", "chrf_bundle")
        )
        note = f"{_counted(sum(sentences), 'sentence')} from English; {_bounds(behaviour.translation)}"
        rows.append(AnswerRow("chrF of translations", text.number(before), text.number(after), note))
    if behaviour.concurrency is not None:
        asked = behaviour.concurrency
        rows.append(
            AnswerRow(
                f"Same answer in a batch of {asked.batch} as alone",
                "",
                f"{text.number(asked.identical)} of {text.number(asked.prompts)}",
            )
        )
    rows += [
        AnswerRow(
            f"{group.name} ({group.metric})",
            text.number(group.original),
            text.number(group.bundle),
            f"{_counted(group.change.tasks, 'task')}, {_changed(group.change)}; {_bounds(group.change)}",
        )
        for group in behaviour.tasks
    ]
    if behaviour.passes:
        rows.append(_computed(behaviour))
    return rows


def _computed(behaviour: Behaviour) -> AnswerRow:
    """Return the row of what the original's answers took."""
    note = (
        f"in {text.number(behaviour.passes)} passes, for {text.number(behaviour.tokens_needed)} tokens of prompts and "
        "answers"
    )
    if behaviour.answers_recomputed:
        anew = _counted(behaviour.answers_recomputed, "answer")
        note += f"; {anew} computed anew in every pass, as the disk had no space for keys and values"
    return AnswerRow("Tokens computed for these answers", text.number(behaviour.tokens_computed), "", note)


def language_row(row: LanguageBehaviour) -> tuple[str, ...]:
    """Return the figures of one language: answers, identical, prefix, tokens, ends, loops and drift."""
    return (
        text.number(row.answers),
        text.number(row.identical),
        text.number(row.exact_prefix_p50),
        text.ratio(row.tokens_bundle / row.tokens_original) if row.tokens_original else "–",
        f"{text.number(row.ended_original)} → {text.number(row.ended_bundle)}",
        f"{text.number(row.loops_original)} → {text.number(row.loops_bundle)}",
        f"{text.number(row.drifted)} of {text.number(row.drift_judged)}" if row.drift_judged else "–",
    )


#: Heads of the columns that ``language_row`` returns.
LANGUAGE_HEADS = (
    "Answers",
    "Same",
    "Same tokens, median",
    "Length",
    "Ended",
    "Loops",
    "Other language",
)


def question_kind(answer: Answer) -> str:
    """Return what was asked, in words: "Question, Thai"."""
    return _KINDS[answer.kind] + (f", {language_name(answer.language)}" if answer.language else "")


def split_common_prefix(original: str, bundle: str) -> tuple[str, str, str]:
    """Return what both texts begin with, in whole characters with their marks, and how each goes on."""
    characters = zip(_characters(original), _characters(bundle), strict=False)
    shared = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], characters))
    return shared, original[len(shared) :], bundle[len(shared) :]


def _characters(text: str) -> list[str]:
    """Return what a reader sees as characters, in order. A flag is two letters here, as the library has it."""
    return [text[start:end] for start, end, _ in split_graphemes(text)[0]]


def _kept(name: str, change: Paired) -> AnswerRow:
    """Return the row of things that the original has all of and the bundle in part."""
    return AnswerRow(name, text.number(change.tasks), text.number(change.tasks - change.lost), _bounds(change))


def _exponential(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _counted(count: int, noun: str) -> str:
    return f"{text.number(count)} {noun}{'' if count == 1 else 's'}"


def _changed(change: Paired) -> str:
    return f"{text.number(change.lost)} worse, {text.number(change.gained)} better"


def _bounds(change: Paired) -> str:
    """Return the bounds of the mean difference of scores from 0 to 1."""
    lower, upper = text.number(change.lower_bound, 2), text.number(change.upper_bound, 2)
    return f"change {lower} to {upper}"
