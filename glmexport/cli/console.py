"""What people see: progress and tables on stderr. Programs read stdout, which carries one JSON document or nothing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from glmexport.progress import Track

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class Terminal:
    """Progress on stderr: a bar with time left where stderr is a terminal, a line when each stage ends elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        if not self.console.is_terminal:
            # A log is read later and elsewhere: nothing is gained by folding it at an imagined width.
            self.console = Console(stderr=True, highlight=False, width=140)

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Track]:
        """A bar of ``total`` steps."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
        )
        with RichProgress(*columns, console=self.console, transient=self.console.is_terminal) as progress:
            task = progress.add_task(f"{label:<24}", total=total, detail="")
            yield _RichTrack(progress, task)

    def remark(self, text: str) -> None:
        """A line of its own."""
        self.console.print(Text.assemble(("note ", "yellow"), text), soft_wrap=True)

    def facts(self, title: str, facts: Mapping[str, str]) -> None:
        """Names and values, aligned."""
        table = Table(
            title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False
        )
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in facts.items():
            table.add_row(Text(name), Text(value))
        self.console.print(table)
        self.console.print()


class _RichTrack:
    def __init__(self, progress: RichProgress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._progress.update(self._task, advance=steps, detail=detail)


class Bytes(click.ParamType[int]):
    """A size such as 8GiB, 500MB or a plain number of bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """To bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        if match is None or match[2].lower() not in _UNITS:
            self.fail(f"{value!r} is not a size; write for example 8GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2].lower()])


def titled_table(title: str, *columns: str) -> Table:
    """An empty table; names on the left, figures on the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def gibibytes(count: float) -> str:
    """A number of bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """A span of time for people, rounded to what matters."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def emit(document: str) -> None:
    """The one document that stdout carries."""
    sys.stdout.write(document.rstrip("\n") + "\n")
    sys.stdout.flush()
