"""The quantized matrices as a reader can survey them: by part, and by decoder block in bands of columns."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmexport.report.document import LinearResult

_LAYERS_PER_BAND = 20
_PARTS = ("embedding", "qkv", "o", "gate_up", "down", "lm_head")


@dataclass(frozen=True)
class Cell:
    """All matrices of one part in one decoder block; of experts, the worst speaks."""

    part: str
    error: float
    """Largest relative error."""
    shade: float
    """0 for the smallest error of all matrices, 1 for the largest, logarithmic between."""
    bits: str
    matrices: int


@dataclass(frozen=True)
class Band:
    """Consecutive decoder blocks, and for every part one cell a block or none."""

    layers: tuple[int, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True)
class PartSummary:
    """Every matrix of one part, over all decoder blocks."""

    part: str
    matrices: int
    formats: tuple[str, ...]
    bits_per_weight: float
    median_error: float
    largest_error: float
    median_round_to_nearest_error: float
    dead_columns: int
    fewest_tokens: float | None
    """The smallest number of effective calibration tokens a column; none if not measured."""


@dataclass(frozen=True)
class Allocation:
    """The whole bundle's matrices, surveyed."""

    parts: tuple[PartSummary, ...]
    bands: tuple[Band, ...]
    outside: tuple[Cell, ...]
    """Embedding and language-model head."""


def summarize(linears: Sequence[LinearResult]) -> Allocation:
    """Group ``linears`` by part and decoder block."""
    places: dict[tuple[str, int | None], list[LinearResult]] = defaultdict(list)
    by_part: dict[str, list[LinearResult]] = defaultdict(list)
    for linear in linears:
        places[linear.part, linear.layer].append(linear)
        by_part[linear.part].append(linear)
    logs = [math.log(x.relative_error) for x in linears if math.isfinite(x.relative_error) and x.relative_error > 0]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    cells = {place: _cell(place[0], members, low, high) for place, members in places.items()}
    order = sorted(by_part, key=lambda part: (_PARTS.index(part) if part in _PARTS else len(_PARTS), part))
    layers = sorted({layer for _, layer in cells if layer is not None})
    inside = [part for part in order if any((part, layer) in cells for layer in layers)]
    bands = []
    for start in range(0, len(layers), _LAYERS_PER_BAND):
        band = tuple(layers[start : start + _LAYERS_PER_BAND])
        bands.append(Band(band, tuple((part, tuple(cells.get((part, layer)) for layer in band)) for part in inside)))
    return Allocation(
        parts=tuple(_part(part, by_part[part]) for part in order),
        bands=tuple(bands),
        outside=tuple(cells[part, None] for part in order if (part, None) in cells),
    )


def _cell(part: str, linears: list[LinearResult], low: float, high: float) -> Cell:
    error = max(linear.relative_error for linear in linears)
    if not math.isfinite(error):
        shade = 1.0
    elif error <= 0 or low == high:
        shade = 0.0
    else:
        shade = (math.log(error) - low) / (high - low)
    bits = "/".join(str(bits) for bits in sorted({linear.bits for linear in linears}))
    return Cell(part, error, shade, bits, len(linears))


def _part(part: str, linears: list[LinearResult]) -> PartSummary:
    tokens = [x.effective_tokens_per_column for x in linears if x.effective_tokens_per_column is not None]
    errors = [linear.relative_error for linear in linears]
    return PartSummary(
        part=part,
        matrices=len(linears),
        formats=tuple(sorted({_format(linear) for linear in linears})),
        bits_per_weight=statistics.fmean(linear.bits_per_weight for linear in linears),
        median_error=statistics.median(errors),
        largest_error=max(errors),
        median_round_to_nearest_error=statistics.median(linear.round_to_nearest_error for linear in linears),
        dead_columns=sum(linear.dead_columns for linear in linears),
        fewest_tokens=min(tokens, default=None),
    )


def _format(linear: LinearResult) -> str:
    symmetry = "symmetric" if linear.symmetric else "asymmetric"
    return f"{linear.bits} bit, groups of {linear.group_size}, {symmetry}"
