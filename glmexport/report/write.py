"""The files that a report is written to: for programs, for people, and for CI servers."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from glmexport.foundation.errors import InputError, MachineError
from glmexport.report.document import HTML_NAME, JSON_NAME, JUNIT_NAME, MARKDOWN_NAME, Report, read_report
from glmexport.report.html import render_html
from glmexport.report.junit import render_junit
from glmexport.report.markdown import render_markdown


def write_report(report: Report, directory: Path) -> None:
    """Write ``report.json`` and its renderings; a reader never sees half of any.

    All are rendered and stored before any replaces its predecessor.

    Raises:
        MachineError: the directory or a file cannot be written.
    """
    _write({**_renderings(report), JSON_NAME: report.model_dump_json(indent=2) + "\n"}, directory)


def render_report(path: Path, directory: Path) -> Report:
    """Write the renderings of the report at ``path`` into ``directory``, and ``report.json`` too if none is there.

    Raises:
        BundleError: ``path`` is no report.
        InputError: ``directory`` has the ``report.json`` of another validation, which would be given its renderings.
        MachineError: the directory or a file cannot be written.
    """
    report = read_report(path)
    beside = directory / JSON_NAME
    if beside.exists() and not beside.samefile(path) and beside.read_bytes() != path.read_bytes():
        raise InputError(
            f"{directory} has the {JSON_NAME} of another validation.", next_step="Give another directory with -o."
        )
    if beside.exists():
        _write(_renderings(report), directory)
    else:
        write_report(report, directory)
    return report


def _renderings(report: Report) -> dict[str, str]:
    return {
        HTML_NAME: render_html(report),
        MARKDOWN_NAME: render_markdown(report),
        JUNIT_NAME: render_junit(report),
    }


def _write(contents: dict[str, str], directory: Path) -> None:
    stored: dict[Path, Path] = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            stored[directory / name] = _store(content, directory)
        for path, temporary in stored.items():
            temporary.replace(path)
    except OSError as error:
        raise MachineError(
            f"The report cannot be written to {directory}: {error.strerror}.",
            next_step="Free space or correct the permissions, then run the same command again.",
        ) from error
    finally:
        for temporary in stored.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _store(content: str, directory: Path) -> Path:
    """``content`` in a new file of ``directory``, on the disk, readable like any other file."""
    descriptor, name = tempfile.mkstemp(prefix=".report-", suffix=".tmp", dir=directory)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
