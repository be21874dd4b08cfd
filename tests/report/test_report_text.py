import math

import pytest

from glmexport.foundation.languages import language_name
from glmexport.report import text


def plain(words: str) -> str:
    return words.replace(text.THIN, " ").replace(text.FIXED, " ")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (1234567, "1 234 567"),
        (0.04123, "0.0412"),
        (0.9999, "1.00"),
        (-2.5, "−2.50"),
        (12345.6, "12 346"),
        (3.2e-6, "3.20 × 10⁻⁶"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
    ],
)
def test_number(value, expected):
    assert plain(text.number(value)) == expected


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (512, "bytes", "512 bytes"),
        (3 * 1024**3, "bytes", "3.00 GiB"),
        (0.0215, "s", "21.5 ms"),
        (0, "s", "0 s"),
        (90, "s", "90.0 s"),
        (5820, "s", "97.0 min"),
        (86400, "s", "24.0 h"),
        (0.5, "fraction", "50.0 %"),
        (1, "fraction", "100 %"),
        (2.8934, "ratio", "2.89×"),
        (11.42, "tokens/s", "11.4 tokens/s"),
        (7, "", "7"),
    ],
)
def test_quantity(value, unit, expected):
    assert plain(text.quantity(value, unit)) == expected


def test_counts_and_bandwidth():
    assert plain(text.count(9_400_279_040)) == "9.40 billion"
    assert plain(text.count(65_000)) == "65 000"
    assert plain(text.bandwidth(92.4e9)) == "92.4 GB/s"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.brief_size(0), "0 B"),
        (text.brief_size(1023), "1023 B"),
        (text.brief_size(1024), "1.0 KiB"),
        (text.brief_size(1.5 * 2**20), "1.5 MiB"),
        (text.brief_size(2**30), "1.0 GiB"),
        (text.brief_size(2**42), "4096.0 GiB"),
        (text.brief_span(8.1 * 3600, 10.6 * 3600), "8 to 11 h"),
        (text.brief_span(3000, 6000), "0.8 to 1.7 h"),
        (text.brief_span(31, 89), "31 to 89 s"),
        (text.brief_span(100, 110), "2 min"),
        (text.brief_duration(0.2), "0 s"),
        (text.brief_duration(89.4), "89 s"),
        (text.brief_duration(90), "2 min"),
        (text.brief_duration(5399), "90 min"),
        (text.brief_duration(5400), "1.5 h"),
        (text.brief_share(0.9994), "99.9%"),
        (text.brief_ratio(1.254), "1.25x"),
        (text.brief_divergence(0.01234), "0.0123"),
        (text.brief_divergence(0.00001), "1e-05"),
        (text.brief_divergence(0), "0.0000"),
        (text.brief_divergence(0.0001, 3), "1e-04"),
        (text.brief_divergence(0.0004, 5), "0.00040"),
    ],
)
def test_what_is_brief(shown, expected):
    """Numbers in a terminal."""
    assert shown == expected


def test_a_share_just_below_one_is_never_written_as_all():
    assert plain(text.percent(0.99996)) == "99.996 %"


def test_value_and_limit_read_the_same_only_if_they_are():
    assert text.value_and_limit(0.0500049, 0.05, "") == ("0.050005", "0.050000")
    first, second = text.value_and_limit(0.05, 0.05, "")
    assert first == second == "0.0500"


@pytest.mark.parametrize(
    ("value", "limit", "direction", "expected"),
    [
        (0.03, 0.04, "at most", 0.25),
        (0.05, 0.04, "at most", -0.25),
        (10, 5, "at least", 1.0),
        (4, 5, "at least", -0.2),
        (0, 0, "at most", None),
        (math.nan, 1, "at most", None),
    ],
)
def test_headroom(value, limit, direction, expected):
    assert text.headroom(value, limit, direction) == (None if expected is None else pytest.approx(expected))


def test_nothing_stays_invisible_or_reorders():
    assert text.visible("a\u202eb\u0000c\n\t") == "a‹U+202E›b‹U+0000›c↵⇥"
    assert text.visible("a\u2069b") == "a‹U+2069›b"
    assert text.visible("می\u200cخواهم") == "می\u200cخواهم"


def test_spaces_at_the_edge_of_a_token_show():
    assert text.token(" the ") == "␣the␣"
    assert text.token("  ") == "␣␣"
    assert text.token("") == "(empty)"


def test_language_names():
    assert language_name("ar") == "Arabic"
    assert language_name("zh-Hant") == "Chinese"
    assert language_name("xx") == "xx"
