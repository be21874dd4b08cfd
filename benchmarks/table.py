"""Rows of the quality benchmark as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from benchmarks.peers import ADDED_UP, ONE_AT_A_TIME

Row = dict[str, Any]
#: Settings of our own that are compared with peers; all others belong to the ablation.
OURS = ("default", "nearest, searched", "nearest")


def format_key(name: str) -> tuple[int, float]:
    """Sorts formats: asymmetric by falling bits per weight, then symmetric, then mixes by rising limit."""
    if name.startswith("mixed "):
        return 2, float(name.removeprefix("mixed "))
    found = re.fullmatch(r"w(\d)g(\d+)(-sym)?", name)
    if found is None:
        raise ValueError(name)
    return int(found[3] is not None), int(found[2]) / int(found[1])


def headline(rows: Iterable[Row], first: dict[str, tuple[str, ...]]) -> list[Row]:
    """Of each tool in each format the row as it comes and the one at its best, and all that ``OURS`` names.

    ``first`` has the settings of each tool; the first that was run is the tool as it comes.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["tool"] != "glmexport" or row["setting"] in OURS:
            groups.setdefault((row["format"], row["tool"]), []).append(row)
    chosen = []
    for (_, tool), group in groups.items():
        settings = [row["setting"] for row in group]
        plain = next((setting for setting in first.get(tool, ()) if setting in settings), None)
        best = min(group, key=lambda row: row["kl_mean_nats"])["setting"]
        chosen += [row for row in group if tool == "glmexport" or row["setting"] in (plain, best)]
    return chosen


def table(rows: Iterable[Row]) -> str:
    """The rows by format and falling divergence; ``ours`` is our default's mean KL over the row's, same format."""
    rows = sorted(rows, key=lambda row: (*format_key(row["format"]), -row["kl_mean_nats"]))
    ours = {row["format"]: row["kl_mean_nats"] for row in rows if is_ours(row)}
    lines = [
        "| format | tool | bits per weight | mean KL | ours | p99 KL | p99.9 KL | top-1 | perplexity ratio "
        "| worst language | wall s | processor s | peak MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        ratio = ours[row["format"]] / row["kl_mean_nats"] if row["format"] in ours and not is_ours(row) else None
        lines.append(
            f"| {row['format']} | {row['tool']}, {row['setting']} | {row['bits_per_weight']:.3f} "
            f"| {row['kl_mean_nats']:.5f} | {number(ratio, 2)} | {row['kl_p99_nats']:.4f} | {row['kl_p999_nats']:.4f} "
            f"| {row['top1_agreement']:.4f} | {row['perplexity_ratio']:.4f} "
            f"| {row['worst_language']} {row['kl_worst_language_nats']:.5f} "
            f"| {row['seconds']:.0f} | {number(row.get('cpu_seconds'), 0)} | {row['peak_rss_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


def overview(rows: Iterable[Row]) -> str:
    """Mean KL in thousandths of a nat: a row for each tool at its best in each uniform format, a column for each."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if not row["format"].startswith("mixed ") and (row["tool"] != "glmexport" or is_ours(row)):
            key = (row["tool"], row["format"])
            best[key] = min(best.get(key, row["kl_mean_nats"]), row["kl_mean_nats"])
    formats = sorted({name for _, name in best}, key=format_key)
    tools = sorted({tool for tool, _ in best}, key=lambda tool: fmean(kl for (of, _), kl in best.items() if of == tool))
    lines = [f"| tool | {' | '.join(formats)} |", f"|---|{'---:|' * len(formats)}"]
    for tool in tools:
        cells = [number(1000 * best[tool, name] if (tool, name) in best else None, 2) for name in formats]
        lines.append(f"| {tool} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation(rows: Iterable[Row], name: str) -> str:
    """What the parts of the solver are worth in format ``name``: each changed alone, then added one after another."""
    ours = {row["setting"]: row for row in rows if row["tool"] == "glmexport" and row["format"] == name}
    alone = [ours[setting] for setting in ONE_AT_A_TIME if setting in ours]
    added = [ours[setting] for setting in ADDED_UP if setting in ours]
    return "\n\n".join(
        (
            _ablation(f"{name}, one part changed", "to the default", [(row, ours.get("default")) for row in alone]),
            _ablation(f"{name}, parts added up", "to the line above", list(zip(added, [None, *added], strict=False))),
        )
    )


def _ablation(title: str, against: str, rows: list[tuple[Row, Row | None]]) -> str:
    lines = [
        f"| {title} | mean KL | {against} | worst language | processor s |",
        "|---|---:|---:|---|---:|",
    ]
    for row, base in rows:
        ratio = row["kl_mean_nats"] / base["kl_mean_nats"] if base else None
        lines.append(
            f"| {row['setting']} | {row['kl_mean_nats']:.5f} | {number(ratio, 3)} "
            f"| {row['worst_language']} {row['kl_worst_language_nats']:.5f} | {number(row.get('cpu_seconds'), 0)} |"
        )
    return "\n".join(lines)


def is_ours(row: Row) -> bool:
    """Whether the row is our recipe as it is."""
    return bool(row["tool"] == "glmexport" and row["setting"] == "default")


def number(value: float | None, digits: int) -> str:
    """With so many decimals; a dash for what is not known."""
    return "–" if value is None else f"{value:.{digits}f}"
