"""Charts as inline SVG. Widths are percentages and type is in pixels, so that a phone can show them too.

Every chart carries a title and a description that says in words what the marks show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

from glmexport.report.svg import element, figure, line, text
from glmexport.report.text import headroom, number, power_of_ten

ROW = 24
"""Height of one row of bars, in px."""


@dataclass(frozen=True)
class Bar:
    """One labelled row: a mark from ``start`` to ``end`` for each series, and its value in words."""

    label: str
    spans: tuple[tuple[float, float], ...]
    text: str
    kind: str = ""
    """CSS classes, for example "worst"; never the only carrier of a meaning."""


@dataclass(frozen=True)
class Marker:
    """A named value on an axis."""

    label: str
    value: float


def ticks(low: float, high: float, most: int = 5) -> tuple[float, ...]:
    """Return at most ``most`` round values (1, 2 or 5 times a power of ten) that cover ``low`` to ``high``."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return (0.0, 1.0)
    power = 10.0 ** math.floor(math.log10(span))
    for step in (factor * power for factor in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first + 1 <= most:
            break
    # A power of ten below 1 is not exact in binary; 12 digits give the decimal that is meant.
    return tuple(float(f"{index * step:.12g}") for index in range(first, last + 1))


def bars(key: str, title: str, axis: str, rows: Sequence[Bar], *, limit: Marker | None = None) -> Markup:
    """Draw horizontal bars on one linear axis that includes 0.

    Args:
        key: prefix of the ids in the page.
        title: what is compared.
        axis: quantity and unit.
        rows: from top to bottom; with two spans a row, the first is the original and the second the bundle.
        limit: a line across all rows.
    """
    ends = [value for row in rows for span in row.spans for value in span]
    if limit is not None:
        ends.append(limit.value)
    finite = [value for value in ends if math.isfinite(value)]
    marks = ticks(min([0.0, *finite]), max([0.0, *finite]))
    low, high = marks[0], marks[-1]

    def at(value: float) -> float:
        bounded = high if math.isnan(value) else min(max(value, low), high)
        return 100 * (bounded - low) / (high - low)

    series = max((len(row.spans) for row in rows), default=1)
    row_height = ROW + 8 * (series - 1)
    top = 24 if limit is not None else 4
    bottom = top + row_height * len(rows)
    plot = [line(at(mark), top, bottom, "axis" if mark == 0 else "grid") for mark in marks]
    plot += [text(at(mark), bottom + 16, f"{mark:g}".replace("-", "−"), "tick", "middle") for mark in marks]
    for index, row in enumerate(rows):
        plot += _row_marks(row, top + index * row_height, row_height, at)
    if limit is not None and math.isfinite(limit.value):
        plot.append(line(at(limit.value), top - 6, bottom, "limit"))
        plot.append(text(at(limit.value), top - 10, limit.label, "limit-label", _anchor(at(limit.value))))
    labels = [
        text(23.5, top + (index + 0.5) * row_height + 4, row.label, f"label {row.kind}".strip(), "end")
        for index, row in enumerate(rows)
    ]
    # A quarter for the labels; of the rest so much that the longest words fit beside a full bar on a phone.
    inner = element("svg", *plot, x="25%", y=0, width="47%", height=bottom + 22, overflow="visible")
    caption = text(48.5, bottom + 36, axis, "axis-label", "middle")
    description = "; ".join(f"{row.label}: {row.text}" for row in rows)
    if limit is not None:
        description += f"; {limit.label}: {number(limit.value)}"
    return figure(key, f"{title} ({axis})", description, bottom + 44, *labels, inner, caption)


def histogram(
    key: str,
    title: str,
    axis: str,
    edges: Sequence[float],
    counts: Sequence[int],
    markers: Sequence[Marker] = (),
) -> Markup:
    """Draw columns on a logarithmic axis; an end bin that reaches 0 or infinity is drawn as wide as any other.

    Args:
        key: prefix of the ids in the page.
        title: what is counted.
        axis: quantity and unit of the edges.
        edges: increasing, one more than the counts.
        counts: positions in each bin.
        markers: values to point out.
    """
    logs = _log_edges(edges)
    low, high = logs[0], logs[-1]
    total = max(1, sum(counts))
    shares = ticks(0.0, 100 * max([*counts, 1]) / total, 4)
    top, plot_height = 10 + 16 * len(markers), 150
    bottom = top + plot_height

    def at(log: float) -> float:
        return 100 * (min(max(log, low), high) - low) / (high - low)

    plot = []
    for share in shares:
        y = bottom - plot_height * share / shares[-1]
        plot.append(element("line", x1="0", x2="100%", y1=y, y2=y, class_="axis" if share == 0 else "grid"))
        plot.append(element("text", f"{share:g} %", x="0", y=y + 4, dx=-6, class_="tick", text_anchor="end"))
    for left, right, count in zip(logs, logs[1:], counts, strict=False):
        height = plot_height * 100 * count / total / shares[-1]
        width = max(0.1, at(right) - at(left) - 0.25)
        plot.append(
            element(
                "rect",
                x=f"{at(left):.2f}%",
                y=bottom - height,
                width=f"{width:.2f}%",
                height=height,
                class_="bar",
            )
        )
    decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    stride = max(1, math.ceil(len(decades) / 7))
    for decade in decades[::stride]:
        plot.append(
            element(
                "line",
                x1=f"{at(decade):.2f}%",
                x2=f"{at(decade):.2f}%",
                y1=bottom,
                y2=bottom + 5,
                class_="axis",
            )
        )
        plot.append(text(at(decade), bottom + 20, power_of_ten(decade), "tick", "middle"))
    plot += _marker_marks([marker for marker in markers if 0 < marker.value < math.inf], top, bottom, at)
    inner = element("svg", *plot, x="12%", y=0, width="85%", height=bottom + 26, overflow="visible")
    caption = text(54.5, bottom + 42, f"{axis}, logarithmic", "axis-label", "middle")
    described = [
        f"{number(left)} to {number(right)}: {number(count)}"
        for left, right, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    described += [f"{marker.label}: {number(marker.value)}" for marker in markers]
    return figure(key, f"{title} ({axis})", "; ".join(described) or "no positions", bottom + 50, inner, caption)


def _marker_marks(markers: Sequence[Marker], top: float, bottom: float, at: Callable[[float], float]) -> list[Markup]:
    """A line each, and a label that goes to the middle from it: the farther out, the higher, so that it passes above
    the lines of those farther in. All lines come before all labels, which cover what they cross nevertheless.
    """
    placed = [(at(math.log10(marker.value)), f"{marker.label} {number(marker.value)}") for marker in markers]
    lines, labels = [], []
    for row, (x, words) in enumerate(sorted(placed, key=lambda item: -abs(item[0] - 50))):
        y = top - 4 - 16 * (len(placed) - 1 - row)
        lines.append(line(x, y - 8, bottom, "limit"))
        labels.append(
            element(
                "text",
                words,
                x=f"{x:.2f}%",
                y=y,
                dx=-5 if x > 50 else 5,
                class_="limit-label",
                text_anchor="end" if x > 50 else "start",
            )
        )
    return [*lines, *labels]


def margin(
    value: float,
    limit: float,
    direction: Literal["at most", "at least"],
    lower: float | None = None,
    upper: float | None = None,
) -> Markup:
    """Draw a bar from the limit in the middle: to the right inside it, to the left beyond it; a line between bounds.

    Half the width is 100 % of the limit; what is longer ends in an arrow.
    """
    room, inside = _room(value, limit, direction)
    length = 50 * min(abs(room), 1.0)
    marks = [
        element("rect", x="0", y=6, width="100%", height=4, class_="track"),
        element(
            "rect",
            x=f"{50 if room >= 0 else 50 - length:.2f}%",
            y=4,
            width=f"{length:.2f}%",
            height=8,
            class_="inside" if inside else "beyond",
        ),
        line(50, 0, 16, "limit"),
    ]
    if lower is not None and upper is not None:
        ends = sorted(50 + 50 * min(max(_room(end, limit, direction)[0], -1), 1) for end in (lower, upper))
        left, width = ends[0], max(ends[1] - ends[0], 0.5)
        marks.append(element("rect", x=f"{left:.2f}%", y=7, width=f"{width:.2f}%", height=2, class_="bounds"))
    if abs(room) > 1:
        marks.append(
            element(
                "text",
                "›" if room > 0 else "‹",
                x="100%" if room > 0 else "0",
                y=12,
                class_="tick",
                text_anchor="end" if room > 0 else "start",
            )
        )
    return element("svg", *marks, class_="margin", aria_hidden="true", width="100%", height=16)


def _room(value: float, limit: float, direction: Literal["at most", "at least"]) -> tuple[float, bool]:
    """Share of the limit that is left, below 0 what is too much; and whether the limit is kept."""
    inside = value <= limit if direction == "at most" else value >= limit
    room = headroom(value, limit, direction)
    if room is None:
        room = 0.0 if value == limit else 1.0 if inside else -1.0
    return room, inside


def _row_marks(row: Bar, y: float, height: float, at: Callable[[float], float]) -> list[Markup]:
    thickness = 12 if len(row.spans) == 1 else 9
    first = y + (height - len(row.spans) * (thickness + 2)) / 2
    marks = []
    for index, span in enumerate(row.spans):
        left, right = sorted(at(value) for value in span)
        # A value that is there, however small, leaves a trace.
        width = max(right - left, 0.25 if span[0] != span[1] else 0.0)
        series = "original" if len(row.spans) > 1 and index == 0 else "bundle"
        marks.append(
            element(
                "rect",
                x=f"{left:.2f}%",
                y=first + index * (thickness + 2),
                width=f"{width:.2f}%",
                height=thickness,
                class_=f"bar {series} {row.kind}".strip(),
            )
        )
    end = max(at(value) for span in row.spans for value in span)
    marks.append(
        element("text", row.text, x=f"{end:.2f}%", y=y + height / 2 + 4, dx=7, class_=f"value {row.kind}".strip())
    )
    return marks


def _log_edges(edges: Sequence[float]) -> tuple[float, ...]:
    """log10 of every edge; the ends are drawn as one bin of the widest inner width where they have none."""
    logs = [math.log10(edge) if math.isfinite(edge) and edge > 0 else math.nan for edge in edges]
    inner = [log for log in logs if not math.isnan(log)]
    if not inner:
        return (0.0, 1.0)
    width = max((right - left for left, right in pairwise(inner)), default=1.0)
    filled = [log if not math.isnan(log) else None for log in logs]
    if filled[0] is None:
        filled[0] = inner[0] - width
    if filled[-1] is None:
        filled[-1] = inner[-1] + width
    return tuple(log for log in filled if log is not None)


def _anchor(x: float) -> str:
    return "end" if x > 70 else "start" if x < 30 else "middle"
