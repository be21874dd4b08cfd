"""Tasks of the user's, one JSON object a line, and pure functions that score an answer from 0 to 1."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import regex
from pydantic import ConfigDict, Field, ValidationError, model_validator

from glmexport.foundation.definition import Definition
from glmexport.foundation.errors import InputError
from glmexport.foundation.untrusted import SMALL, parse_object, read_regular

if TYPE_CHECKING:
    from sacrebleu.metrics.chrf import CHRF

#: Seconds within which a search has to end. What is not exponential takes milliseconds on the longest answers.
SEARCH_SECONDS = 1.0
#: Length of the texts on which a pattern is tried before anything is generated.
_TRIAL_LENGTH = 2000
#: Bytes of a file of tasks.
_FILE_LIMIT = 256 << 20
_EXAMPLE = '{"prompt": "...", "metric": "exact", "target": "..."}'

Text = Annotated[str, Field(min_length=1)]


class Message(Definition):
    """One turn of a conversation."""

    role: Text
    content: str


class Task(Definition):
    """A question, and what an answer to it is held against. Either ``prompt`` or ``messages`` is given."""

    model_config = ConfigDict(strict=True)

    #: The task's name, by default the file's name and the line.
    id: Text
    #: The group that the task is reported in; by default the file's name.
    name: Text
    #: Text that is continued as it is.
    prompt: Text | None = None
    #: A conversation, which the chat template renders.
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    #: BCP-47 tag of the language that the answer should be in.
    language: Text | None = None
    metric: Literal["exact", "choice", "regex", "chrf"]
    #: exact, chrf: the answer, or several of which the best counts; regex: the pattern; choice: the right one of
    #: ``choices``, or its index from 0.
    target: str | int | Annotated[tuple[str, ...], Field(min_length=1)]
    choices: Annotated[tuple[Text, ...], Field(min_length=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The texts of ``target``."""
        return self.target if isinstance(self.target, tuple) else (str(self.target),)

    @property
    def answer(self) -> int:
        """The index of the right one of ``choices``."""
        assert self.choices is not None
        return self.target if isinstance(self.target, int) else self.choices.index(self.targets[0])

    @model_validator(mode="after")
    def _asks_one_thing(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if (self.choices is None) == (self.metric == "choice"):
            raise ValueError("choices are for the metric choice, and it needs them")
        return self

    @model_validator(mode="after")
    def _target_suits_the_metric(self) -> Self:
        if self.choices is not None:
            if len(set(self.choices)) < len(self.choices):
                raise ValueError("one of the choices is there twice")
            inside = (
                0 <= self.target < len(self.choices) if isinstance(self.target, int) else self.target in self.choices
            )
            if not inside:
                raise ValueError(f"target {self.target!r} is none of the choices, nor the index of one")
        elif isinstance(self.target, int):
            raise ValueError("target is a text, or several in a list")
        if self.metric == "regex":
            if not isinstance(self.target, str):
                raise ValueError("target is one pattern")
            _try(self.target)
        return self


def _try(pattern: str) -> None:
    """Compile ``pattern`` and search where patterns that backtrack exponentially never come to an end."""
    try:
        compiled = regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"target is no regular expression: {error}") from error
    for character in sorted({"a", "0", " ", *pattern}):
        try:
            compiled.search(character * _TRIAL_LENGTH + "\0", timeout=SEARCH_SECONDS)
        except TimeoutError as error:
            raise ValueError(
                f"target needs more than {SEARCH_SECONDS:g} s to search {_TRIAL_LENGTH} times {character!r}; "
                "write it without repetitions inside of repetitions"
            ) from error


def read_tasks(paths: Sequence[Path]) -> list[Task]:
    """Read the tasks of ``.jsonl`` files, in order.

    Raises:
        InputError: no such file, another file type, not UTF-8, a line that is no task, an id that is there twice, or
            no task at all.
    """
    tasks: dict[str, Task] = {}
    for path in paths:
        if path.suffix != ".jsonl":
            raise InputError(f"Tasks {path} are not .jsonl.", next_step=f"Write one task a line: {_EXAMPLE}.")
        try:
            content = read_regular(path, _FILE_LIMIT).decode("utf-8")
        except (OSError, ValueError) as error:
            raise InputError(
                f"Tasks {path} cannot be read: {error}.", next_step="Give a readable UTF-8 file."
            ) from error
        # Not splitlines: strings in JSON may hold the other separators that it splits at.
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                task = _task(path, number, line)
                if task.id in tasks:
                    raise InputError(
                        f"{path}, line {number}: the id {task.id!r} is there twice.",
                        next_step="Give every task its own.",
                    )
                tasks[task.id] = task
    if not tasks:
        raise InputError(
            f"There are no tasks in {', '.join(map(str, paths)) or 'no file'}.",
            next_step=f"Write one a line: {_EXAMPLE}.",
        )
    return list(tasks.values())


def _task(path: Path, number: int, line: str) -> Task:
    where = f"{path}, line {number}"
    try:
        record = parse_object(line.encode(), SMALL)
    except ValueError as error:
        raise InputError(f"{where}: not usable: {error}.", next_step=f"Write one task a line: {_EXAMPLE}.") from error
    named = {"id": f"{path.name}:{number}", "name": path.stem} | record
    try:
        # In JSON again: only there a list is a tuple, strictly.
        return Task.model_validate_json(json.dumps(named))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = str(first["loc"][0]) if first["loc"] else "the task"
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{where}: {key}: {message}.",
            next_step=f"Correct the line; {error.error_count()} of its values cannot be used.",
        ) from error


def score(task: Task, text: str) -> float:
    """Return the score of the generated ``text``, 0 to 1, for every metric but choice.

    Raises:
        InputError: the task's pattern does not come to an end on this text.
    """
    if task.metric == "exact":
        return float(any(exact(text, target) for target in task.targets))
    if task.metric == "chrf":
        return chrf(text, task.targets)
    assert task.metric == "regex", "choices are scored by their probabilities"
    try:
        return float(regex.search(task.targets[0], text, timeout=SEARCH_SECONDS) is not None)
    except TimeoutError as error:
        raise InputError(
            f"{task.id}: the pattern needs more than {SEARCH_SECONDS:g} s for an answer of {len(text)} characters.",
            next_step="Write it without repetitions inside of repetitions.",
        ) from error


def score_choice(task: Task, log_probabilities: Sequence[float]) -> float:
    """Return 1 if the right choice is the likeliest, else 0.

    ``log_probabilities`` of each choice after the prompt, in nats.

    They are divided by the number of bytes of the choice in UTF-8, so that a long one is not unlikely for its length;
    bytes depend on no tokenizer. Of equals the first is taken; what is not a number is the unlikeliest.
    """
    assert task.choices is not None
    rates = [
        -math.inf if math.isnan(value) else value / len(choice.encode())
        for value, choice in zip(log_probabilities, task.choices, strict=True)
    ]
    best = max(rates)
    return float(best > -math.inf and rates.index(best) == task.answer)


def exact(text: str, target: str) -> bool:
    """Return whether both are the same text, in Unicode's NFC and with any white space as one blank."""
    return _normalized(text) == _normalized(target)


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def chrf(text: str, references: Sequence[str]) -> float:
    """Return the character n-gram F-score against the nearest reference, 0 to 1.

    This is chrF2 (Popović 2015) with sacrebleu's defaults.
    """
    return float(_chrf().sentence_score(text, list(references)).score) / 100


@cache
def _chrf() -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
