"""The rows of speed, memory and energy for every rendering: what was measured, its bounds, and why not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from glmexport.report import text
from glmexport.results.performance import Figure, Interval, Performance, Speed

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class SpeedRow:
    """One quantity; ``original`` is None where it was not measured, ``ratio`` where there is nothing to compare.

    A plain number was counted, not estimated, and has no bounds.
    """

    name: str
    unit: str
    more_is_better: bool
    original: Interval | float | None
    bundle: Interval | float | None
    #: Ratio of bundle over original.
    ratio: Interval | float | None


def speed_rows(performance: Performance | None) -> tuple[SpeedRow, ...]:
    """Return a row for every quantity, also those that this machine does not tell; none where nothing was measured."""
    if performance is None:
        return ()
    original, bundle, ratios = performance.original, performance.bundle, performance.ratios

    def row(name: str, field: str, unit: str, *, more_is_better: bool = False) -> SpeedRow:
        before, after = getattr(original, field, None), getattr(bundle, field)
        paired = getattr(ratios, field, None)
        if paired is None and before is not None and after is not None:
            # Loaded once, and memory: nothing to pair.
            paired = median_of(after) / median_of(before) if median_of(before) else None
        return SpeedRow(name, unit, more_is_better, before, after, paired)

    return (
        row("Loading", "load_s", "s"),
        row("Time to first token", "ttft_s", "s"),
        row("Prefill", "prefill_tokens_per_s", "tokens/s", more_is_better=True),
        row("Decode", "decode_tokens_per_s", "tokens/s", more_is_better=True),
        row("Peak memory", "peak_memory_bytes", "bytes"),
        row("Energy per decoded token", "energy_j_per_token", "J"),
    )


def median_of(cell: Interval | float) -> float:
    """Return the number itself."""
    return cell.value if isinstance(cell, Interval) else float(cell)


def only_if_bounded(cell: Interval | float | None) -> Interval | None:
    """Return ``cell`` if it has bounds that say something."""
    return cell if isinstance(cell, Interval) and math.isfinite(cell.upper) else None


def shown_value(cell: Interval | float | None, unit: str) -> str:
    """Return the number with its unit, without bounds."""
    return NOT_MEASURED if cell is None else text.quantity(median_of(cell), unit)


def bounds(cell: Interval | float | None, unit: str) -> str:
    """Return the range from the lower to the upper bound; empty where there are none."""
    sure = only_if_bounded(cell)
    return f"{text.quantity(sure.lower, unit)} to {text.quantity(sure.upper, unit)}" if sure else ""


def comparison(row: SpeedRow) -> str:
    """Return in words how the bundle compares: a difference is called one only if the bounds agree on it."""
    if row.ratio is None or not (math.isfinite(median_of(row.ratio)) and median_of(row.ratio) > 0):
        return "–"
    better, worse = ("less", "more") if row.unit in ("bytes", "J") else ("faster", "slower")
    sure = only_if_bounded(row.ratio)
    if sure and sure.lower <= 1 <= sure.upper:
        return f"no sure difference ({text.ratio(sure.lower)} to {text.ratio(sure.upper)})"

    gains = median_of(row.ratio) >= 1 if row.more_is_better else median_of(row.ratio) <= 1
    # As a factor of at least 1, whichever way round that is.
    upright = median_of(row.ratio) >= 1
    told = f"{text.ratio(_turned(median_of(row.ratio), upright))} {better if gains else worse}"
    if sure:
        low, high = sorted(_turned(end, upright) for end in (sure.lower, sure.upper))
        told += f" ({text.ratio(low)} to {text.ratio(high)})"
    return told


def _turned(ratio: float, upright: bool) -> float:
    if upright:
        return ratio
    return 1 / ratio if ratio else math.inf


def bounded_by(performance: Performance) -> str:
    """Return the bound that memory sets to decoding, and how much of it is reached."""
    bound = performance.roofline_decode_tokens_per_s
    if bound is None:
        return "How fast memory is read could not be measured, so that nothing is known to bound decoding."
    share = share_reached(performance)
    return f"Memory bandwidth bounds decoding at {text.number(bound)} tokens/s, of which {share} is reached."


def share_reached(performance: Performance) -> str:
    """Return the share of the memory's bound of decoding that is reached."""
    bound = performance.roofline_decode_tokens_per_s
    share = performance.bundle.decode_tokens_per_s.value / bound if bound else math.nan
    return text.percent(share) if math.isfinite(share) else "–"


def tail_percentiles(figure: Figure, unit: str) -> tuple[str, str]:
    """Return the 90th and 99th percentile on the bad side, or how many rounds it takes."""

    def told(percentile: float | None, least: int) -> str:
        if percentile is None:
            return f"{NOT_MEASURED}: {text.number(figure.n)} rounds, it takes {least}"
        return text.quantity(percentile, unit)

    return told(figure.p90, 64), told(figure.p99, 662)


def figure_sources(performance: Performance) -> str:
    """Return the source of the peak memory, and why there is no energy if there is none."""
    bundle: Speed = performance.bundle
    told = f"Peak memory of each process: {bundle.peak_memory_source}, loading included."
    if bundle.energy_absent_because:
        told += f" Energy was not measured: {bundle.energy_absent_because}"
    return told


def node_placement(performance: Performance) -> str:
    """Return where the nodes of the graph ran."""
    placement = performance.placement
    nodes: dict[str, int] = {}
    for row in placement.operators:
        nodes[row.provider] = nodes.get(row.provider, 0) + row.nodes
    if not nodes:
        return "Where the nodes of the graph ran was not measured."
    return "Nodes of the graph: " + ", ".join(f"{text.number(count)} on {name}" for name, count in nodes.items()) + "."
