"""Two answers are parted between characters as readers see them, in any script."""

from __future__ import annotations

from itertools import accumulate

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from glmexport.report.behaviour import parted

SIGNS = [
    "a", "e\u0301", "é", " ", "中", "か\u3099", "กำ", "हि", "न्", "\u1112\u1161\u11ab", "각", "שָׁ", "😀", "👍\U0001f3fd",
    "👩\u200d👧", "🇩🇪", "🏴\U000e0067\U000e007f", "\r\n", "\n", "க்", "❤\ufe0f",
]  # fmt: skip


@given(st.lists(st.sampled_from(SIGNS), max_size=6), st.text(max_size=4), st.text(max_size=4))
def test_no_character_is_cut(same: list[str], left: str, right: str) -> None:
    """Where a library of characters would not cut either, and the parts are the texts."""
    original, bundle = "".join(same) + left, "".join(same) + right
    shared, before, after = parted(original, bundle)
    assert (shared + before, shared + after) == (original, bundle)
    for text in (original, bundle):
        assert len(shared) in {0, *accumulate(map(len, regex.findall(r"\X", text)))}


@pytest.mark.parametrize("sign", SIGNS)
def test_all_that_is_alike_is_shared(sign: str) -> None:
    assert parted(f"ab{sign}", f"ab{sign}x") == (f"ab{sign}", "", "x")
    assert parted(f"ab{sign}x", f"ab{sign}y") == (f"ab{sign}", "x", "y")


def test_marks_stay_with_what_they_mark() -> None:
    assert parted("ae\u0301", "ae") == ("a", "e\u0301", "e")
    assert parted("👩\u200d👧", "👩\u200d👦") == ("", "👩\u200d👧", "👩\u200d👦")
    assert parted("🇩🇪", "🇩🇰") == ("", "🇩🇪", "🇩🇰")
