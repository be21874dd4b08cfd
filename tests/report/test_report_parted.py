"""Two answers are parted between characters as readers see them, in any script."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmexport.report.behaviour import split_common_prefix

SIGNS = [
    "a", "e\u0301", "é", " ", "中", "か\u3099", "हि", "न्", "\u1112\u1161\u11ab", "각", "שָׁ", "😀", "👍\U0001f3fd",
    "👩\u200d👧", "🏴\U000e0067\U000e007f", "க்", "❤\ufe0f",
]  # fmt: skip


@given(st.lists(st.sampled_from(SIGNS), max_size=6), st.text(max_size=4), st.text(max_size=4))
def test_no_character_is_cut(same: list[str], left: str, right: str) -> None:
    """No mark is parted from what it marks, and the parts are the texts."""
    original, bundle = "".join(same) + left, "".join(same) + right
    shared, before, after = split_common_prefix(original, bundle)
    assert (shared + before, shared + after) == (original, bundle)
    for rest in (before, after):
        assert not shared or not rest or not unicodedata.category(rest[0]).startswith("M")
        assert not (shared and rest.startswith("\u200d"))


@pytest.mark.parametrize("sign", SIGNS)
def test_all_that_is_alike_is_shared(sign: str) -> None:
    assert split_common_prefix(f"ab{sign}", f"ab{sign}x") == (f"ab{sign}", "", "x")
    assert split_common_prefix(f"ab{sign}x", f"ab{sign}y") == (f"ab{sign}", "x", "y")


def test_marks_stay_with_what_they_mark() -> None:
    assert split_common_prefix("ae\u0301", "ae") == ("a", "e\u0301", "e")
    assert split_common_prefix("👩\u200d👧", "👩\u200d👦") == ("", "👩\u200d👧", "👩\u200d👦")
