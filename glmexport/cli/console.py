"""The console that people see, on stderr. Programs read stdout, which carries one JSON document or nothing."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from glmexport.foundation.progress import Track
from glmexport.foundation.untrusted import visible

#: Seconds between two lines about one stage in a log.
_LOGGED_S = 60.0
_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class PlainConsole(Console):
    """A console on stderr to which nothing in a text is a command: neither markup nor what a terminal obeys.

    Names, templates and reports of strangers are printed; whatever way they come to a line, they pass here.
    """

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False, markup=False, emoji=False)
        if not self.is_terminal:
            # A log is read later and elsewhere: nothing is gained by folding it at an imagined width.
            self.width = 140

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as a console does; what is no command of its own has no control characters."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text, lines=True), segment.style)


class Terminal:
    """The progress on stderr: a bar with time left on a terminal; elsewhere a line a minute, and one at its end."""

    def __init__(self) -> None:
        self.console = PlainConsole()

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Track]:
        """Show a bar of ``total`` steps."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
        )
        with RichProgress(*columns, console=self.console, transient=self.console.is_terminal) as progress:
            task = progress.add_task(f"{label:<24}", total=total, detail="")
            yield _RichTrack(progress, task) if self.console.is_terminal else _LoggedTrack(progress, task)

    def remark(self, text: str) -> None:
        """Show a line of its own."""
        self.console.print(Text.assemble(("note ", "yellow"), visible(text)), soft_wrap=True)

    def facts(self, title: str, facts: Mapping[str, str]) -> None:
        """Show names and values, aligned."""
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


class _LoggedTrack(_RichTrack):
    """Steps that a log tells of now and then, as a bar is written there at its end alone."""

    def __init__(self, progress: RichProgress, task: TaskID) -> None:
        super().__init__(progress, task)
        self._begun = self._said = time.monotonic()

    def advance(self, steps: int = 1, detail: str = "") -> None:
        super().advance(steps, detail)
        now, (task,) = time.monotonic(), self._progress.tasks
        total = task.total or 0.0
        if now - self._said < _LOGGED_S or not 0 < task.completed < total:
            return
        self._said = now
        gone = now - self._begun
        left = gone * (total - task.completed) / task.completed
        of = f"{task.description} {task.completed:.0f}/{total:.0f}, {_clock(gone)}, about {_clock(left)} left"
        self._progress.console.print(visible(f"{of} {detail}".rstrip()), soft_wrap=True)


def _clock(seconds: float) -> str:
    """Return hours, minutes and seconds, as the bars write them."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Bytes(click.ParamType[int]):
    """The type of options that take a size such as 8GiB, 500MB or a plain number of bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert to bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        if match is None or match[2].lower() not in _UNITS:
            self.fail(f"{value!r} is not a size; write for example 8GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2].lower()])


def titled_table(title: str, *columns: str) -> Table:
    """Return an empty table; names on the left, figures on the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def emit(document: str) -> None:
    """Print the one document that stdout carries; in JSON, what a terminal would obey is written as JSON's escapes."""
    is_json = document.startswith(("{", "["))
    shown = "".join(map(_escaped, document)) if is_json else visible(document, lines=True)
    sys.stdout.write(shown.rstrip("\n") + "\n")
    sys.stdout.flush()


def _escaped(character: str) -> str:
    plain = character.isprintable() or visible(character, lines=True) == character
    return character if plain else json.dumps(character)[1:-1]


def say(label: str, message: str, next_step: str) -> None:
    """Print what happened and what to do about it, on stderr."""
    click.echo(f"{click.style(label, fg='red', bold=True)} {_indented(message)}", err=True)
    click.echo(f"      {_indented(next_step)}", err=True)


def _indented(text: str) -> str:
    """Further lines of a text begin further in, so that none passes for a message."""
    return "\n      ".join(map(visible, text.split("\n")))
