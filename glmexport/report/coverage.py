"""Tables of how calibration text spread over routed experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from glmexport.report import text
from glmexport.report.document import CoverageResult

_BOUNDS = (0, 1, 16, 64, 256, 1024, 4096)

#: Heads of the columns of ``coverage_rows``: block, cold experts, and how many experts have so many positions.
COVERAGE_HEADS = (
    "Block",
    "Cold",
    *("none" if stop == 1 else f"{start:,} to {stop - 1:,}" for start, stop in pairwise(_BOUNDS)),
    f"{_BOUNDS[-1]:,} or more",
)


def coverage_rows(layers: Sequence[CoverageResult]) -> list[tuple[str, ...]]:
    """Return a histogram for each decoder block: how many experts were chosen by how many positions."""
    rows = []
    for layer in layers:
        counts = [
            sum(start <= tokens < stop for tokens in layer.tokens) for start, stop in pairwise((*_BOUNDS, 1 << 62))
        ]
        shown = [text.number(count) if count else "" for count in counts]
        rows.append((str(layer.layer), text.number(len(layer.cold)), *shown))
    return rows
