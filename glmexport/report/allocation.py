"""A survey of the quantized matrices: by part, and by decoder block in bands of columns."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmexport.report.document import GroupResult, LinearResult

_LAYERS_PER_BAND = 20
_PARTS = ("embedding", "qkv", "q_a", "kv_a", "q_b", "kv_b", "o", "gate_up", "down", "lm_head")


@dataclass(frozen=True)
class MatrixCell:
    """All matrices of one part in one decoder block; of experts, the worst one's figures are shown."""

    part: str
    error: float | None
    """Largest relative error; none if not measured."""
    shade: float
    """Shade of the cell: 0 for the smallest error of all matrices, 1 for the largest, logarithmic between."""
    bits: str
    matrices: int
    loss_nats: float | None
    """The sum of the losses that their groups cause alone under a budget, in nats; None without one."""


@dataclass(frozen=True)
class Band:
    """Consecutive decoder blocks, and for every part one cell a block or none."""

    layers: tuple[int, ...]
    rows: tuple[tuple[str, tuple[MatrixCell | None, ...]], ...]


@dataclass(frozen=True)
class PartSummary:
    """A summary of every matrix of one part, over all decoder blocks."""

    part: str
    matrices: int
    formats: tuple[str, ...]
    bits_per_weight: float
    median_error: float | None
    largest_error: float | None
    median_round_to_nearest_error: float | None
    """Median error of rounding to nearest. Each of the three errors is of the matrices that it was measured of; None if
    of none."""
    dead_columns: int
    fewest_tokens: float | None
    """The smallest number of effective calibration tokens a column; none if not measured."""
    mean_shrinkage: float | None
    """Mean shrinkage of the matrices that have an asymmetric target; None if none has."""
    unpolished_rows: int


@dataclass(frozen=True)
class FormatSummary:
    """A summary of every group that a budget gave one format."""

    format: str
    groups: int
    stored_bits: int
    loss_nats: float


@dataclass(frozen=True)
class ExpertBits:
    """The bits that a budget gave to the routed experts of one decoder block, in one of their parts."""

    layer: int
    part: str
    experts: Mapping[int, int]
    """The number of experts by the bits of a code."""
    cold: int
    """Experts that hardly any of the text chose."""


@dataclass(frozen=True)
class BudgetSpending:
    """The account of where the bits of a budget went."""

    stored_bits: int
    loss_nats: float
    formats: tuple[FormatSummary, ...]
    """The formats that were given, the one with the most bits first."""
    groups: tuple[tuple[str, GroupResult], ...]
    """Each group with its format; the largest loss first. The experts of a decoder block are one group a part."""
    experts: tuple[ExpertBits, ...]
    """The bits of routed experts, in the order of the model; empty without any, or where no matrices are given."""

    @property
    def expert_bits(self) -> tuple[int, ...]:
        """The bits of codes that any of ``experts`` have, ascending."""
        return tuple(sorted({bits for row in self.experts for bits in row.experts}))


@dataclass(frozen=True)
class Allocation:
    """A survey of the whole bundle's matrices."""

    parts: tuple[PartSummary, ...]
    bands: tuple[Band, ...]
    outside: tuple[MatrixCell, ...]
    """Cells of the embedding and of the language-model head."""
    spending: BudgetSpending | None
    """The account of the budget; None without a budget."""


def summarize(linears: Sequence[LinearResult], groups: Sequence[GroupResult] = ()) -> Allocation:
    """Group ``linears`` by part and decoder block; ``groups`` are those of a budget."""
    group_of = {name: group for group in groups for name in group.matrices}
    places: dict[tuple[str, int | None], list[LinearResult]] = defaultdict(list)
    by_part: dict[str, list[LinearResult]] = defaultdict(list)
    for linear in linears:
        places[linear.part, linear.layer].append(linear)
        by_part[linear.part].append(linear)
    logs = [math.log(x.relative_error) for x in linears if math.isfinite(x.relative_error) and x.relative_error > 0]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    cells = {place: _cell(place[0], members, low, high, group_of) for place, members in places.items()}
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
        spending=_spending(linears, groups) if groups else None,
    )


def _spending(linears: Sequence[LinearResult], groups: Sequence[GroupResult]) -> BudgetSpending:
    by_format: dict[str, list[GroupResult]] = defaultdict(list)
    for group in groups:
        by_format[format_label(group)].append(group)
    formats = (
        FormatSummary(name, len(members), sum(x.stored_bits for x in members), math.fsum(x.loss_nats for x in members))
        for name, members in by_format.items()
    )
    layers = {linear.name: linear.layer for linear in linears}
    experts: dict[tuple[int, str], list[GroupResult]] = defaultdict(list)
    shown = []
    for group in groups:
        layer = layers.get(group.matrices[0])
        if layer is None or group.expert_part is None:
            shown.append((format_label(group), group))
        else:
            experts[layer, group.expert_part].append(group)
    shown += [_together(*place, members) for place, members in experts.items()]
    return BudgetSpending(
        stored_bits=sum(group.stored_bits for group in groups),
        loss_nats=math.fsum(group.loss_nats for group in groups),
        formats=tuple(sorted(formats, key=lambda row: (-row.stored_bits, row.format))),
        groups=tuple(sorted(shown, key=lambda row: -row[1].loss_nats)),
        experts=tuple(
            ExpertBits(layer, part, Counter(group.bits for group in members), sum(group.cold for group in members))
            for (layer, part), members in experts.items()
        ),
    )


def _together(layer: int, part: str, members: Sequence[GroupResult]) -> tuple[str, GroupResult]:
    """Return the experts of a decoder block as one group, with its formats in words."""
    bits = sorted({group.bits for group in members})
    whole = members[0].model_copy(
        update={
            "name": f"block {layer} {part}, {len(members)} experts",
            "matrices": tuple(name for group in members for name in group.matrices),
            "stored_bits": sum(group.stored_bits for group in members),
            "loss_nats": math.fsum(group.loss_nats for group in members),
        }
    )
    return f"{' and '.join(map(str, bits))} bit, by expert", whole


def _cell(
    part: str, linears: list[LinearResult], low: float, high: float, group_of: Mapping[str, GroupResult]
) -> MatrixCell:
    error = max(_measured(linear.relative_error for linear in linears), default=None)
    if error is None or error <= 0 or low == high:
        shade = 0.0
    elif math.isinf(error):
        shade = 1.0
    else:
        shade = (math.log(error) - low) / (high - low)
    bits = "/".join(str(bits) for bits in sorted({linear.bits for linear in linears}))
    # Several matrices of a group, as query, key and value are, count once.
    groups = {group.name: group for linear in linears if (group := group_of.get(linear.name))}
    loss = math.fsum(group.loss_nats for group in groups.values()) if groups else None
    return MatrixCell(part, error, shade, bits, len(linears), loss)


def _part(part: str, linears: list[LinearResult]) -> PartSummary:
    tokens = [x.effective_tokens_per_column for x in linears if x.effective_tokens_per_column is not None]
    errors = _measured(linear.relative_error for linear in linears)
    nearest = _measured(linear.round_to_nearest_error for linear in linears)
    kept = [linear.shrinkage for linear in linears if linear.shrinkage is not None]
    return PartSummary(
        part=part,
        matrices=len(linears),
        formats=tuple(sorted({format_label(linear) for linear in linears})),
        bits_per_weight=statistics.fmean(linear.bits_per_weight for linear in linears),
        median_error=statistics.median(errors) if errors else None,
        largest_error=max(errors, default=None),
        median_round_to_nearest_error=statistics.median(nearest) if nearest else None,
        dead_columns=sum(linear.dead_columns for linear in linears),
        fewest_tokens=min(tokens, default=None),
        mean_shrinkage=statistics.fmean(kept) if kept else None,
        unpolished_rows=sum(linear.unpolished_rows for linear in linears),
    )


def _measured(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def format_label(linear: LinearResult | GroupResult) -> str:
    """Return the format of a matrix, or of several that share one, in words."""
    if linear.codec != "affine":
        return f"{linear.codec.upper()}, groups of {linear.group_size}"
    symmetry = "symmetric" if linear.symmetric else "asymmetric"
    return f"{linear.bits} bit, groups of {linear.group_size}, {symmetry}"
