import math
import re
import xml.etree.ElementTree as ET

import pytest

from glmexport.report.charts import Bar, Marker, bars, histogram, margin, ticks


def parse(markup):
    return ET.fromstring(f"<root>{markup}</root>")


def rects(markup, kind):
    return [
        (float(node.get("x").rstrip("%")), float(node.get("width").rstrip("%")))
        for node in parse(markup).iter("rect")
        if kind in node.get("class", "").split()
    ]


def words(markup):
    return [node.text for node in parse(markup).iter("text")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 0.04, (0, 0.01, 0.02, 0.03, 0.04)),
        (0, 17, (0, 5, 10, 15, 20)),
        (0, 1, (0, 0.5, 1)),
        (-1, 3, (-1, 0, 1, 2, 3)),
        (0, 0, (0, 1)),
        (0, math.inf, (0, 1)),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, expected):
    assert ticks(low, high) == expected


def test_bar_lengths_are_proportional():
    markup = bars("k", "Title", "nats", [Bar("a", ((0, 0.04),), "0.04"), Bar("b", ((0, 0.01),), "0.01")])
    assert rects(markup, "bar") == [(0, 100), (0, 25)]


def test_a_waterfall_bar_begins_where_the_one_before_ends():
    markup = bars(
        "k", "Title", "nats", [Bar("a", ((0, 30),), ""), Bar("b", ((30, 40),), ""), Bar("c", ((40, 20),), "")]
    )
    assert rects(markup, "bar") == [(0, 75), (75, 25), (50, 50)]


def test_bars_of_two_series_are_told_apart():
    markup = bars("k", "Title", "x", [Bar("a", ((0, 10), (0, 5)), "10 → 5")])
    assert rects(markup, "original") == [(0, 100)]
    assert rects(markup, "bundle") == [(0, 50)]


def test_the_limit_is_on_the_axis_even_beyond_every_bar():
    markup = bars("k", "Title", "x", [Bar("a", ((0, 5),), "5")], limit=Marker("bound", 20))
    lines = [node for node in parse(markup).iter("line") if node.get("class") == "limit"]
    assert [line.get("x1") for line in lines] == ["100.00%"]
    assert rects(markup, "bar") == [(0, 25)]
    assert "bound" in words(markup)


def test_values_that_are_no_numbers_fill_the_axis_instead_of_failing():
    markup = bars("k", "Title", "x", [Bar("a", ((0, math.nan),), "not a number"), Bar("b", ((0, 2),), "2")])
    assert rects(markup, "bar") == [(0, 100), (0, 100)]


def test_every_chart_has_a_title_with_the_unit_and_its_values_in_words():
    for markup in (
        bars("k", "Title", "nats", [Bar("a", ((0, 1),), "1.00")]),
        histogram("k", "Title", "nats", [0.1, 1, 10], [3, 1], [Marker("mean", 0.5)]),
    ):
        svg = next(parse(markup).iter("svg"))
        assert svg.get("role") == "img"
        assert svg.get("aria-labelledby") == "k-title k-desc"
        assert svg.find("title").text == "Title (nats)"
        assert svg.find("desc").text
    assert "a: 1.00" in str(bars("k", "Title", "nats", [Bar("a", ((0, 1),), "1.00")]))


def test_histogram_columns_lie_on_the_logarithm():
    markup = histogram("k", "Title", "nats", [0.01, 0.1, 1, 100], [1, 2, 1])
    assert [x for x, _ in rects(markup, "bar")] == [0, 25, 50]
    heights = [float(node.get("height")) for node in parse(markup).iter("rect")]
    assert heights[0] == heights[2] == heights[1] / 2
    assert {"10⁻²", "10⁰", "10²"} <= set(words(markup))


def test_histogram_marker_stands_at_its_value():
    markup = histogram("k", "Title", "nats", [0.01, 0.1, 1], [1, 1], [Marker("mean", 0.1)])
    lines = [node.get("x1") for node in parse(markup).iter("line") if node.get("class") == "limit"]
    assert lines == ["50.00%"]
    assert "mean 0.100" in words(markup)


def test_open_ends_are_as_wide_as_the_other_bins():
    markup = histogram("k", "Title", "nats", [0, 0.1, 1, math.inf], [1, 1, 1])
    assert [x for x, _ in rects(markup, "bar")] == pytest.approx([0, 33.33, 66.67])


def test_histogram_without_positions():
    assert "no positions" in str(histogram("k", "Title", "nats", [0.1, 1], [0]))


@pytest.mark.parametrize(
    ("value", "limit", "direction", "kind", "expected"),
    [
        (0.02, 0.04, "at most", "inside", (50, 25)),
        (0.05, 0.04, "at most", "beyond", (37.5, 12.5)),
        (20, 5, "at least", "inside", (50, 50)),
        (2.5, 5, "at least", "beyond", (25, 25)),
        (0, 0, "at most", "inside", (50, 0)),
        (3, 0, "at most", "beyond", (0, 50)),
        (math.nan, 1, "at most", "beyond", (0, 50)),
    ],
)
def test_margin(value, limit, direction, kind, expected):
    assert rects(margin(value, limit, direction), kind) == [expected]


def test_text_is_escaped():
    markup = bars("k", "<b>", 'a"&', [Bar("<script>", ((0, 1),), "</text>")], limit=Marker("<i>", 1))
    assert not re.search(r"<(b|script|i)>", markup)
    assert "<script>" in words(markup)
