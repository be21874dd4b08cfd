"""``glmexport compare``: a comparison of two reports, with what changed by more than chance alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import json_option
from glmexport.foundation.errors import EXIT_BLOCK, EXIT_INCONCLUSIVE, EXIT_PASS
from glmexport.foundation.untrusted import visible
from glmexport.report.text import brief_size

if TYPE_CHECKING:
    from glmexport.report.comparison import Change, Comparison

_EXIT = {"no worse": EXIT_PASS, "worse": EXIT_BLOCK, "undecided": EXIT_INCONCLUSIVE}
_STYLE = {"no worse": "bold green", "worse": "bold red", "undecided": "bold yellow"}


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--confidence", type=click.FloatRange(0.5, 1, min_open=True, max_open=True), default=0.95, show_default=True,
    help="Of the intervals, and that no change is called significant by chance.",
)  # fmt: skip
@json_option
def compare(old: Path, new: Path, confidence: float, as_json: bool) -> int:
    """Compare the report.json (or bundle) NEW with OLD: two builds, two dates or two devices.

    Exit codes: 0 no significant worsening, 1 a significant one or a verdict that got worse, 2 the text does not suffice
    to exclude one as large as the policy's limit.
    """
    from glmexport.cli.signature import signed_report_path
    from glmexport.report.compare import compare as compare_reports
    from glmexport.report.document import read_report

    before, after = (read_report(signed_report_path(path)) for path in (old, new))
    comparison = compare_reports(before, after, confidence=confidence)
    _show(Terminal().console, comparison)
    if as_json:
        emit(comparison.model_dump_json(indent=2))
    return _EXIT[comparison.outcome]


def _show(console: Console, comparison: Comparison) -> None:
    for name, side in (("old", comparison.old), ("new", comparison.new)):
        console.print(_foreign(f"{name}  {side.bundle}  {side.bundle_digest}  {side.verdict}"), soft_wrap=True)
    if comparison.differing:
        table = _table("\nDifferent", "", "old", "new", words=3)
        for each in comparison.differing:
            table.add_row(*map(_foreign, (each.name, each.old, each.new)))
        console.print(table)
    told = [each for each in comparison.changes if each.significant or (each.p_value is None and each.old != each.new)]
    if told:
        console.print(_changes(told, comparison.confidence))
    tested = [change for change in comparison.changes if change.p_value is not None]
    quiet = [change for change in tested if not change.significant]
    if quiet:
        console.print(f"~ {len(quiet)} of {len(tested)} tested figures: no significant change", style="dim")
    for remark in comparison.remarks:
        console.print(Text.assemble(("note ", "yellow"), _foreign(remark)), soft_wrap=True)
    if comparison.gates:
        table = _table("\nGates with another verdict", "gate", "old", "new", "now in", words=4)
        for gate in comparison.gates:
            tags = ", ".join(gate.languages) or "-"
            table.add_row(_foreign(gate.name), gate.old or "-", gate.new or "-", _foreign(tags))
        console.print(table)
    for reason in comparison.reasons:
        console.print(_foreign(reason), soft_wrap=True)
    console.print(Text.assemble("outcome  ", (comparison.outcome, _STYLE[comparison.outcome])))


def _foreign(words: str) -> Text:
    """Return text of a report, which need not be ours, so that no markup or control character reaches the terminal."""
    return Text(visible(words))


def _changes(changes: list[Change], confidence: float) -> Table:
    table = _table(
        "\nSignificant changes, and what was not tested",
        "figure", "language", "old", "new", "change", f"{100 * confidence:.4g} % interval", "p",
    )  # fmt: skip
    for change in changes:
        table.add_row(*_cells(change), style="" if not change.significant else "red" if change.worse else "green")
    return table


def _cells(change: Change) -> tuple[Text | str, ...]:
    bounds = "-"
    if change.lower is not None and change.upper is not None:
        bounds = f"{_moved(change, change.lower)} to {_moved(change, change.upper)}"
    chance = "not tested"
    if change.p_value is not None:
        chance = f"{change.p_value:.3f}" if change.p_value >= 0.001 else "< 0.001"
    return (
        change.name,
        _foreign(change.language or "-"),
        _value(change.old, change.unit),
        _value(change.new, change.unit),
        _moved(change, change.change),
        bounds,
        chance,
    )


def _value(value: float, unit: str) -> str:
    if unit == "bytes":
        return brief_size(value)
    if unit == "share":
        return f"{value:.2%}"
    return f"{value:.4g} {unit}" if unit in ("s", "tokens/s") else f"{value:.4g}"


def _moved(change: Change, value: float) -> str:
    """A ratio in percent, a difference of shares in percentage points."""
    if change.scale == "ratio":
        return f"{value - 1:+.2%}"
    return f"{100 * value:+.2f} pp" if change.unit == "share" else f"{value:+.3g}"


def _table(title: str, *columns: str, words: int = 2) -> Table:
    """The first so many columns hold words, the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right", overflow="fold")
    return table
