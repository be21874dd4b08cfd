"""The quality benchmark's rows as a chart: divergence against bits per weight, a line a tool.

python -m benchmarks.plot [RESULTS] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.table import Row, format_key, is_ours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).with_name("results")
OURS = "glmexport"
#: Told apart by people who do not tell all hues apart (after Okabe and Ito); ours is the darkest.
COLOURS = {
    OURS: "#000000",
    "auto-round": "#0072b2",
    "gptqmodel": "#d55e00",
    "llm-compressor": "#cc79a7",
    "nncf": "#009e73",
    "llama-cpp": "#8c6d1f",
    "hqq": "#4a9fd0",
    "onnxruntime": "#b07d00",
}
#: Lines that share a colour: asymmetric formats, symmetric ones, mixes.
STYLES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("", {"linestyle": "-", "marker": "o"}),
    (", symmetric", {"linestyle": "--", "marker": "o", "markerfacecolor": "white"}),
    (", mixed", {"linestyle": "-", "marker": "D"}),
)
_INCHES = (9.0, 5.6)
_POINTS = 9
#: Between the middles of two labels, in points.
_APART = 11.0

Point = tuple[float, float]


def front(points: list[Point]) -> list[Point]:
    """The points that no other beats in both coordinates, by rising first and falling second."""
    kept: list[Point] = []
    for bits, kl in sorted(points):
        if not kept or kl < kept[-1][1]:
            kept.append((bits, kl))
    return kept


def series(rows: list[Row]) -> dict[tuple[str, int], list[Point]]:
    """By tool and index into ``STYLES``: the front of (bits per weight, mean KL in nats) over settings and formats.

    Of ours only the default counts, beaten by itself or not: nothing is chosen by what is plotted.
    """
    found: dict[tuple[str, int], list[Point]] = {}
    for row in rows:
        if row["tool"] != OURS or is_ours(row):
            key = (row["tool"], format_key(row["format"])[0])
            found.setdefault(key, []).append((row["bits_per_weight"], row["kl_mean_nats"]))
    return {key: sorted(points) if key[0] == OURS else front(points) for key, points in sorted(found.items())}


def spread(heights: list[float], apart: float) -> list[float]:
    """The heights, moved up where they are less than ``apart`` above the next lower one; order is kept."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = list(heights)
    for lower, upper in pairwise(order):
        placed[upper] = max(placed[upper], placed[lower] + apart)
    return placed


def draw(axes: Axes, lines: dict[tuple[str, int], list[Point]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter

    for (tool, kind), points in lines.items():
        style = {"color": COLOURS[tool], "linewidth": 2 if tool == OURS else 1.2, "markersize": 5, **STYLES[kind][1]}
        axes.plot(*zip(*points, strict=True), zorder=3 if tool == OURS else 2, **style)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight of the quantized matrices, scales and zero points included")
    axes.set_ylabel("mean KL divergence from the original, nats per token")
    axes.xaxis.set_major_locator(MultipleLocator(0.25))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="both", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label(axes: Axes, lines: dict[tuple[str, int], list[Point]]) -> None:
    """Name every line at its last point, on the right of the chart where the names do not cover each other."""
    scale = axes.figure.dpi / 72
    right = max(points[-1][0] for points in lines.values())
    ends = [points[-1] for points in lines.values()]
    heights = [axes.transData.transform(end)[1] / scale for end in ends]
    for ((tool, kind), _), end, height, place in zip(
        lines.items(), ends, heights, spread(heights, _APART), strict=True
    ):
        x = axes.transData.transform((right, end[1]))[0] / scale + 14
        here = axes.transData.transform(end)[0] / scale
        axes.annotate(
            tool + STYLES[kind][0],
            end,
            (x - here, place - height),
            textcoords="offset points",
            color=COLOURS[tool],
            fontsize=_POINTS,
            fontweight="bold" if tool == OURS else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": COLOURS[tool], "linewidth": 0.4, "alpha": 0.6, "shrinkB": 4},
        )


def plot(rows: list[Row], path: Path) -> None:
    """Write the chart; the same rows give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    lines = series(rows)
    # Text stays text, and element ids do not change from run to run.
    with matplotlib.rc_context({"svg.hashsalt": "glmexport", "svg.fonttype": "none", "font.size": _POINTS}):
        figure = Figure(_INCHES, facecolor="white")
        axes = figure.add_axes((0.09, 0.1, 0.71, 0.86))
        draw(axes, lines)
        label(axes, lines)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality.svg")
    options = parser.parse_args()
    plot(json.loads(options.results.read_text(encoding="utf-8"))["rows"], options.output)


if __name__ == "__main__":
    main()
