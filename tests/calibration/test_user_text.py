"""Text of the user's: what is taken, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmexport.calibration.corpus import USER, user_documents
from glmexport.foundation.errors import InputError
from glmexport.tokenizer.tokenizer import Tokenizer


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_text_file_is_one_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("One.\n\nTwo. 你好\n", encoding="utf-8")
    (found,) = user_documents([path], tokenizer)
    assert (found.id, found.language, found.text) == ("notes.txt", USER, "One.\n\nTwo. 你好\n")


def test_every_line_with_text_is_a_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "notes.jsonl", {"text": "One."}, {"text": "Two.", "source": "x"})
    path.write_text(path.read_text(encoding="utf-8") + "\n  \n" + '{"text": "Three."}\r\n', encoding="utf-8")
    found = user_documents([path], tokenizer)
    assert [document.text for document in found] == ["One.", "Two.", "Three."]
    assert [document.id for document in found] == ["notes.jsonl:1", "notes.jsonl:2", "notes.jsonl:5"]
    assert {document.language for document in found} == {USER}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_lines_end_at_line_feeds_only(tmp_path: Path, tokenizer: Tokenizer, separator: str) -> None:
    """JSON allows these inside a string as they are, and text from the web has them."""
    path = write(tmp_path / "notes.jsonl", {"text": f"One.{separator}Two."}, {"text": "Three."})
    assert [document.text for document in user_documents([path], tokenizer)] == [f"One.{separator}Two.", "Three."]


def test_messages_are_rendered_by_the_chat_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello!"}]
    (found,) = user_documents([write(tmp_path / "chat.jsonl", {"messages": messages})], tokenizer)
    assert found.text == tokenizer.render(messages)
    assert "<|user|>\n你好<|assistant|>\nHello!" in found.text


def test_files_keep_their_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", {"text": name}) for name in "ba"]
    assert [document.text for document in user_documents(paths, tokenizer)] == ["b", "a"]
    assert user_documents([], tokenizer) == []


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"text": "cut off',
        "[]",
        '"text"',
        "{}",
        '{"text": 3}',
        '{"content": "x"}',
        '{"messages": "x"}',
        '{"messages": ["x"]}',
        '{"messages": [{"role": "user", "content": "x"}, null]}',
    ],
)
def test_a_line_that_is_neither_is_refused_with_its_number(tmp_path: Path, tokenizer: Tokenizer, line: str) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"notes\.jsonl, line 2: not a JSON object with") as refused:
        user_documents([path], tokenizer)
    assert '"role": "user"' in refused.value.next_step


@pytest.mark.parametrize("name", ["notes.md", "notes", "notes.json"])
def test_another_kind_of_file_is_refused(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    path = tmp_path / name
    path.write_text("text", encoding="utf-8")
    with pytest.raises(InputError, match=r"is neither \.txt nor \.jsonl"):
        user_documents([path], tokenizer)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"missing\.txt cannot be read"):
        user_documents([tmp_path / "missing.txt"], tokenizer)
    path = tmp_path / "latin.txt"
    path.write_bytes("für".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt cannot be read") as refused:
        user_documents([path], tokenizer)
    assert "UTF-8" in refused.value.next_step
