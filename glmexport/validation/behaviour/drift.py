"""Detection of an answer in another language than it was asked in, and than the original answered in.

The languages are py3langid's: a naive Bayes model over byte sequences, shipped with the library and read from the disk.
A test asks it about the shipped evaluation text, in 21 languages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

#: Bytes of letters in UTF-8 below which no language is told: about 60 letters of Latin script, 20 Chinese characters.
LEAST_BYTES = 60
#: Share of probability below which no language is told.
LEAST_SHARE = 0.5

#: Languages of which texts are taken for each other too often, or that have several tags; they count as the first.
_ALIKE = (
    ("zh", "wuu", "yue", "cmn", "hak", "gan", "nan"),
    ("no", "nb", "nn"),
    ("id", "ms"),
    ("sr", "hr", "bs", "sh", "cnr"),
    ("es", "an", "ext"),
    ("ar", "arz", "ary"),
    ("en", "pcm"),
    ("uz", "uzs"),
    ("tl", "fil"),
    ("he", "iw"),
)
_FIRST = {tag: group[0] for group in _ALIKE for tag in group}
#: The library's tag for what is no language, such as code.
_NO_LANGUAGE = "zxx"
#: Code and addresses are in no language.
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)
_LETTERLESS = re.compile(r"[\W\d_]+")


@dataclass(frozen=True)
class LanguageGuess:
    """A language by its BCP-47 primary tag, and the share of probability that it has, 0.5 to 1."""

    tag: str
    share: float


def primary_language(tag: str) -> str:
    """Return the language that a BCP-47 tag counts as: ``zh-Hant`` as ``zh``, ``nb`` as ``no``, ``ms`` as ``id``."""
    first = tag.replace("_", "-").partition("-")[0].lower()
    return _FIRST.get(first, first)


def detect_language(text: str) -> LanguageGuess | None:
    """Return the language that most of ``text`` is in; None where there is too little of it to tell."""
    prose = _CODE.sub(" ", text)
    if len(_LETTERLESS.sub("", prose).encode("utf-8", "surrogatepass")) < LEAST_BYTES:
        return None
    shares: dict[str, float] = {}
    for tag, share in _identifier().rank(prose):
        shares[primary_language(tag)] = shares.get(primary_language(tag), 0.0) + share
    tag = max(shares, key=shares.__getitem__)
    if tag == _NO_LANGUAGE or shares[tag] < LEAST_SHARE:
        return None
    return LanguageGuess(tag, min(shares[tag], 1.0))


def knows_language(tag: str) -> bool:
    """Return whether texts in the language of a BCP-47 tag can be recognized."""
    return primary_language(tag) in {primary_language(label) for label in _identifier().labels if label != _NO_LANGUAGE}


def has_drifted(
    prompt_language: str | None, original: LanguageGuess | None, bundle: LanguageGuess | None
) -> bool | None:
    """Return whether the bundle wrote in another language than both what was asked for and what the original wrote.

    Args:
        prompt_language: BCP-47 tag of what was asked for. Where it is None, or unknown to the library, the guesses for
            the two texts are compared alone.
        original: of the original's text.
        bundle: of the bundle's text.

    Returns:
        None if it cannot be told: the bundle wrote too little, or there is nothing to compare it with.
    """
    expected = {guess.tag for guess in (original,) if guess is not None}
    if prompt_language is not None and knows_language(prompt_language):
        expected.add(primary_language(prompt_language))
    if bundle is None or not expected:
        return None
    return bundle.tag not in expected


@cache
def _identifier() -> LanguageIdentifier:
    """Takes about a second and 90 MiB, when first asked."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
