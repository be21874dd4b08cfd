"""Text: the shipped corpora, split by document into calibration and evaluation, and text of the user's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glmexport.foundation.definition import Definition, read_toml
from glmexport.foundation.errors import DefinitionError, InputError
from glmexport.foundation.resources import shipped
from glmexport.foundation.untrusted import DocumentLimits, parse_object, read_regular
from glmexport.tokenizer.tokenizer import Tokenizer

#: Language under which text of the user's counts.
USER = "user"
Split = Literal["calibration", "evaluation"]

#: Lines shorter than this recur in any two texts of a kind (headings, list markers) and show no leakage.
_SHORTEST_TELLING_LINE = 20
#: Keys of a line of a user's file: a document, or a conversation.
_LINE_LIMITS = DocumentLimits(text=16 << 20)
#: Bytes of a user's file; more is not calibrated with, and would have to lie in memory.
_FILE_LIMIT = 4 << 30
#: A BCP-47 tag; it becomes part of file names too.
_TAG = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")


class CorpusFile(Definition):
    """One file of documents in one language."""

    language: str
    split: Split
    file: str
    licence: str
    source: str
    documents: int
    characters: int
    sha256: str


class _Corpora(Definition):
    corpus: tuple[CorpusFile, ...]


@dataclass(frozen=True)
class Document:
    """A text that is never divided between calibration and evaluation."""

    id: str
    language: str
    text: str


def shipped_documents(split: Split, languages: Iterable[str] | None = None) -> list[Document]:
    """Return the documents of the shipped corpora, in the order of ``corpora.toml``; all languages or the named ones.

    Raises:
        DefinitionError: a file does not have the digest that ``corpora.toml`` states.
    """
    folder = shipped("calibration") / "corpora"
    wanted = None if languages is None else set(languages)
    documents = []
    for entry in read_toml(folder / "corpora.toml", _Corpora).corpus:
        if entry.split == split and (wanted is None or entry.language in wanted):
            try:
                content = (folder / entry.file).read_bytes()
            except OSError as error:
                raise DefinitionError(
                    f"{folder / entry.file} cannot be read: {error.strerror}.", next_step="Install glmexport again."
                ) from error
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise DefinitionError(
                    f"{folder / entry.file} is not the file that corpora.toml describes (its sha256 differs).",
                    next_step="Install glmexport again, or update corpora.toml if the change is yours.",
                )
            for line in content.decode("utf-8").rstrip("\n").split("\n"):
                record = json.loads(line)
                documents.append(Document(record["id"], entry.language, record["text"]))
    return documents


def shipped_languages() -> list[str]:
    """Return the languages of the shipped evaluation text."""
    folder = shipped("calibration") / "corpora"
    entries = read_toml(folder / "corpora.toml", _Corpora).corpus
    return sorted({entry.language for entry in entries if entry.split == "evaluation"})


def user_documents(paths: Sequence[Path], tokenizer: Tokenizer, split: Split = "calibration") -> list[Document]:
    """Read text of the user's: ``.txt`` files, and ``.jsonl`` with ``text`` or chat ``messages`` on each line.

    For evaluation a line may name its ``language`` (BCP-47); otherwise all count as one, ``user``.

    Raises:
        InputError: no such file, another file type, not UTF-8, or a line that is neither.
    """
    documents = []
    for path in paths:
        try:
            content = read_regular(path, _FILE_LIMIT).decode("utf-8")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{split.capitalize()} text {path} cannot be read: {error}.", next_step="Give a readable UTF-8 file."
            ) from error
        if path.suffix == ".txt":
            documents.append(Document(path.name, USER, content))
        elif path.suffix == ".jsonl":
            # Not splitlines: strings in JSON may hold the other separators that it splits at.
            for number, line in enumerate(content.split("\n"), start=1):
                if line.strip():
                    record = _record(path, number, line)
                    language = _language(path, number, record) if split == "evaluation" else USER
                    text = _record_text(path, number, record, tokenizer)
                    documents.append(Document(f"{path.name}:{number}", language, text))
        else:
            raise InputError(
                f"{split.capitalize()} text {path} is neither .txt nor .jsonl.",
                next_step="Convert it to one of the two.",
            )
    return documents


def evaluation_documents(
    paths: Sequence[Path], tokenizer: Tokenizer, calibrated: Collection[str] = ()
) -> list[Document]:
    """Return the shipped evaluation text, and text of the user's in ``paths`` that no calibration has seen.

    Args:
        paths: as ``user_documents`` takes them.
        tokenizer: whose chat template renders conversations.
        calibrated: fingerprints of the user's calibration text.

    Raises:
        InputError: a file cannot be used, or one of its documents is calibration text.
    """
    own = user_documents(paths, tokenizer, "evaluation")
    if own:
        seen = {*calibrated, *map(fingerprint, shipped_documents("calibration"))}
        shared = [document.id for document in own if fingerprint(document) in seen]
        if shared:
            raise InputError(
                f"{len(shared)} documents of the evaluation text are calibration text too, the first {shared[0]}.",
                next_step="Leave them out of one of the two: a bundle is not judged on what it was fitted to.",
            )
    return [*shipped_documents("evaluation"), *own]


def fingerprint(document: Document) -> str:
    """Return a digest that is the same for documents that differ in white space and case alone."""
    return hashlib.sha256(_folded(document.text).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        return parse_object(line.encode(), _LINE_LIMITS)
    except ValueError as error:
        raise _unusable(path, number) from error


def _record_text(path: Path, number: int, record: dict[str, Any], tokenizer: Tokenizer) -> str:
    if isinstance(record.get("text"), str):
        return str(record["text"])
    messages = record.get("messages")
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        return tokenizer.render(messages)
    raise _unusable(path, number)


def _language(path: Path, number: int, record: dict[str, Any]) -> str:
    tag = record.get("language", USER)
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        raise InputError(
            f"{path}, line {number}: {tag!r} is no language.", next_step='Write a BCP-47 tag, as in "language": "zh".'
        )
    return tag


def _unusable(path: Path, number: int) -> InputError:
    return InputError(
        f"{path}, line {number}: not a JSON object with 'text' or 'messages'.",
        next_step='Write {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}.',
    )


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


@dataclass(frozen=True)
class TextOverlap:
    """The overlap of two sets of documents; zero everywhere is what is wanted."""

    shared_documents: int
    shared_lines: int


def overlap(calibration: Sequence[Document], evaluation: Sequence[Document]) -> TextOverlap:
    """Count identical documents and identical lines of at least 20 characters, white space and case folded."""
    documents = {_folded(document.text) for document in calibration} & {_folded(d.text) for d in evaluation}
    return TextOverlap(len(documents), len(_lines(calibration) & _lines(evaluation)))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _lines(documents: Sequence[Document]) -> set[str]:
    lines = (_folded(line) for document in documents for line in document.text.splitlines())
    return {line for line in lines if len(line) >= _SHORTEST_TELLING_LINE}
