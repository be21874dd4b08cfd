"""Text that is certain: whole characters, never a stop string, whatever the tokens are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import write_tokenizer

from glmexport.serving.text import AnswerText, Decoder, Token
from glmexport.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte, so that every other character is split."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer.open(directory)


def told(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> tuple[list[str], list[int], bool]:
    """Texts of the parts, the tokens told, and whether a stop string ended it."""
    answer = AnswerText(Decoder(tokenizer), stops)
    parts = []
    for id_ in ids:
        parts.append(answer.add(Token(id_)))
        if answer.stopped:
            break
    parts.append(answer.finish())
    return [part.text for part in parts], [token.id for part in parts for token in part.tokens], answer.stopped


alphabet = st.text("abé你🎈", max_size=30)
stop_lists = st.lists(st.text("abé你", min_size=1, max_size=4), max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=alphabet, stops=stop_lists)
def test_up_to_the_stop_string_that_is_complete_first(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    texts, tokens, stopped = told(tokenizer, tokenizer.encode(text), stops)
    wanted = text[: min(found)[1]] if found else text
    assert ("".join(texts), stopped) == (wanted, bool(found))
    assert tokens == tokenizer.encode(wanted)


def test_nothing_is_held_that_no_stop_string_begins_with(tokenizer: Tokenizer) -> None:
    texts, _, _ = told(tokenizer, tokenizer.encode("abcSTOx"), ["STOP"])
    assert texts == ["a", "b", "c", "", "", "", "STOx", ""]


def test_special_tokens_are_not_shown_and_split_no_character(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("你")
    texts, tokens, _ = told(tokenizer, [first, tokenizer.special_tokens["<|user|>"], *rest], [])
    assert "".join(texts) == "你" and len(tokens) == 4


def test_tags_that_are_special_tokens_are_shown(tokenizer: Tokenizer) -> None:
    decoder = Decoder(tokenizer, {"<|user|>"})
    assert decoder.add(tokenizer.special_tokens["<|user|>"]) == "<|user|>"
    assert decoder.add(tokenizer.special_tokens["<|assistant|>"]) == ""


@pytest.mark.parametrize("size", [1, 5])
def test_bytes_that_are_no_character(tokenizer: Tokenizer, size: int, tmp_path: Path) -> None:
    broken = [tokenizer.encode("你")[0]] * size
    texts, _, _ = told(tokenizer, [*tokenizer.encode("a"), *broken, *tokenizer.encode("bc")], [])
    assert "".join(texts) == "a" + "\ufffd" * size + "bc"
    assert "".join(told(tokenizer, [*tokenizer.encode("a"), *broken], [])[0]) == "a"
