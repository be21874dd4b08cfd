"""The language of answers: on the shipped text, and where there is none to tell."""

from __future__ import annotations

import pytest

from glmexport.calibration.corpus import shipped_documents
from glmexport.validation.behaviour.drift import (
    LanguageGuess,
    detect_language,
    has_drifted,
    knows_language,
    primary_language,
)

LANGUAGES = sorted({document.language for document in shipped_documents("evaluation")})


@pytest.mark.parametrize("tag", LANGUAGES)
def test_languages_of_the_corpora_are_recognized(tag: str) -> None:
    assert knows_language(tag)
    texts = [document.text[:400] for document in shipped_documents("evaluation") if document.language == tag][:8]
    guesses = [guess for text in texts if (guess := detect_language(text))]
    assert len(guesses) >= 5
    assert sum(guess.tag == primary_language(tag) for guess in guesses) >= len(guesses) - 1
    assert all(0.5 <= guess.share <= 1 for guess in guesses)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Yes, of course.",
        "1234567890 " * 50,
        "```python\n" + "def addition(first, second):\n    return first + second\n" * 5 + "```",
        # A fence that was cut before its end.
        "```python\n" + "for element in collection:\n    process(element)\n" * 5,
        " ".join(f"https://example.org/a/long/path/to/document/{index}" for index in range(9)),
        "`some_identifier` " * 40,
        "\ud800" * 10,
        "好" * 19,
    ],
)
def test_too_little_prose_has_no_language(text: str) -> None:
    assert detect_language(text) is None


def test_code_beside_prose_does_not_count() -> None:
    german = "Diese Funktion addiert zwei Zahlen und gibt ihre Summe an den Aufrufer zurück, ohne etwas zu ändern."
    code = "```python\n" + "return the sum of these numbers and nothing else\n" * 20 + "```"
    guess = detect_language(f"{german}\n{code}")
    assert guess is not None and guess.tag == "de"


@pytest.mark.parametrize(
    ("tag", "first"),
    [("zh-Hant", "zh"), ("zh_CN", "zh"), ("yue", "zh"), ("nb", "no"), ("ms", "id"), ("iw", "he"), ("DE-at", "de")],
)
def test_primary(tag: str, first: str) -> None:
    assert primary_language(tag) == first


def test_what_is_known() -> None:
    assert (
        knows_language("zh-Hans")
        and knows_language("nb")
        and not knows_language("tlh")
        and not knows_language("zxx")
        and not knows_language("")
    )


GERMAN, ENGLISH, FRENCH = LanguageGuess("de", 0.9), LanguageGuess("en", 0.9), LanguageGuess("fr", 0.9)


@pytest.mark.parametrize(
    ("asked", "original", "bundle", "moved"),
    [
        ("de", GERMAN, GERMAN, False),
        ("de", GERMAN, ENGLISH, True),
        ("de-CH", None, GERMAN, False),
        ("de", None, ENGLISH, True),
        # As the original did.
        ("de", ENGLISH, ENGLISH, False),
        # As it was asked, though the original did not.
        ("de", ENGLISH, GERMAN, False),
        ("de", ENGLISH, FRENCH, True),
        (None, GERMAN, GERMAN, False),
        (None, GERMAN, ENGLISH, True),
        ("tlh", GERMAN, GERMAN, False),
        ("tlh", GERMAN, ENGLISH, True),
        # It cannot be told.
        ("de", GERMAN, None, None),
        ("de", None, None, None),
        (None, GERMAN, None, None),
        (None, None, GERMAN, None),
        ("tlh", None, GERMAN, None),
    ],
)
def test_drifted(
    asked: str | None, original: LanguageGuess | None, bundle: LanguageGuess | None, moved: bool | None
) -> None:
    assert has_drifted(asked, original, bundle) is moved
