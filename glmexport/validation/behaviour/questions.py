"""Questions that both models answer freely: texts to go on with, questions, tools, sentences to translate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from glmexport.calibration.corpus import Document
from glmexport.foundation.definition import Definition
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.languages import language_name
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.behaviour.tasks import Task

TOOL_CALL = "<tool_call>"

Kind = Literal["continue", "chat", "tools", "translate", "task"]

#: Tokens of a text that is to be gone on with: of one length, so that several can be asked at once without padding.
_BEGINNING = 32
_QUESTION = 120
#: Sentences to translate: shorter ones are headings, and longer ones do not end within the tokens of an answer.
_SENTENCE = (20, 160)
_PARALLEL, _SOURCE = "udhr/", "en"

TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "search_articles",
            "description": "Articles about a subject.",
            "parameters": {
                "type": "object",
                "properties": {"subject": {"type": "string"}, "limit": {"type": "integer"}},
                "required": ["subject"],
            },
        },
    },
)


class Question(Definition):
    """A prompt as token ids, and what is known of its answer."""

    id: str
    kind: Kind
    #: BCP-47 tag that the answer should be in; None if nobody says.
    language: str | None
    ids: list[int]
    #: Number of tokens at which an answer is cut.
    max_tokens: int
    #: Text of the prompt that belongs to the answer.
    lead: str = ""
    #: A translation made by people.
    expected: str | None = None


def questions(
    documents: Sequence[Document], tokenizer: Tokenizer, *, each: int, translations: int, max_tokens: int
) -> list[Question]:
    """Return ``each`` texts of every language to go on with, a question and a call, and ``translations`` from English.

    From held-out documents. Questions need a chat template, and calls one that knows of tool calls; a template that
    refuses a conversation is not asked it.
    """
    found: list[Question] = []
    for language in dict.fromkeys(document.language for document in documents):
        own = [document for document in documents if document.language == language]
        for document in own[:each]:
            ids = tokenizer.sequence(document.text, judged=True)[:_BEGINNING]
            if len(ids) == _BEGINNING:
                found.append(
                    Question(id=document.id, kind="continue", language=language, ids=ids, max_tokens=max_tokens)
                )
        if each and tokenizer.has_chat_template:
            found += _chat(own[-1], tokenizer, max_tokens)
    if translations and tokenizer.has_chat_template:
        found += _translations(documents, tokenizer, translations, max_tokens)
    return found


def some_of_each_kind(asked: Sequence[Question], most: int) -> list[Question]:
    """Return at most so many questions of every language, in order: one of each kind before a second of any."""
    numbers: dict[tuple[str | None, Kind], int] = {}
    ranked: dict[str | None, list[tuple[int, int]]] = {}
    for place, question in enumerate(asked):
        group = (question.language, question.kind)
        numbers[group] = numbers.get(group, 0) + 1
        ranked.setdefault(question.language, []).append((numbers[group], place))
    chosen = sorted(place for entries in ranked.values() for _, place in sorted(entries)[:most])
    return [asked[place] for place in chosen]


def task_question(task: Task, tokenizer: Tokenizer, max_tokens: int) -> Question:
    """Return a task of the user's that is answered by a text.

    Raises:
        CheckpointError: it is a conversation, and there is no chat template or it refuses.
    """
    return Question(
        id=task.id,
        kind="task",
        language=task.language,
        ids=task_prompt(task, tokenizer),
        max_tokens=task.max_tokens or max_tokens,
    )


def task_prompt(task: Task, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of what is asked; what looks like a control token in it is text."""
    if task.messages is not None:
        return tokenizer.encode_chat([turn.model_dump() for turn in task.messages], add_generation_prompt=True)
    assert task.prompt is not None
    return tokenizer.sequence(task.prompt, judged=True)


def _chat(document: Document, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Question]:
    message = {"role": "user", "content": document.text[:_QUESTION]}
    ids = _prompt(tokenizer, [message])
    if ids:
        yield Question(
            id=f"{document.id}/chat", kind="chat", language=document.language, ids=ids, max_tokens=max_tokens
        )
    opening = tokenizer.encode(tokenizer.written(TOOL_CALL))
    knows = tokenizer.template_mentions(TOOL_CALL) and len(opening) == 1
    called = _prompt(tokenizer, [message], tools=list(TOOLS)) if knows else None
    if called:
        yield Question(
            id=f"{document.id}/tools",
            kind="tools",
            language=document.language,
            ids=[*called, *opening],
            max_tokens=max_tokens,
            lead=TOOL_CALL,
        )


def _prompt(tokenizer: Tokenizer, messages: list[dict[str, str]], **variables: object) -> list[int] | None:
    try:
        return tokenizer.encode_chat(messages, add_generation_prompt=True, **variables)
    except CheckpointError:
        return None


def _translations(
    documents: Sequence[Document], tokenizer: Tokenizer, each: int, max_tokens: int
) -> Iterator[Question]:
    """Lines of documents that are in every language, from English."""
    by_id = {document.id: document for document in documents if document.id.startswith(_PARALLEL)}
    for language in dict.fromkeys(document.language for document in documents):
        asked = 0
        for document in (d for d in by_id.values() if d.language == language != _SOURCE):
            source = by_id.get(document.id.replace(f"/{language}/", f"/{_SOURCE}/"))
            lines = document.text.split("\n")
            sentences = source.text.split("\n") if source else []
            if len(lines) != len(sentences):
                continue
            for number, (sentence, line) in enumerate(zip(sentences, lines, strict=True)):
                if asked == each or not _SENTENCE[0] <= len(sentence) <= _SENTENCE[1]:
                    continue
                text = f"Translate into {language_name(language)}:\n{sentence}"
                ids = _prompt(tokenizer, [{"role": "user", "content": text}])
                if ids:
                    asked += 1
                    yield Question(
                        id=f"{document.id}/{number}",
                        kind="translate",
                        language=language,
                        ids=ids,
                        max_tokens=max_tokens,
                        expected=line,
                    )
