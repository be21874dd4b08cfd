"""``glmexport report``: measured results, rendered again, and the schema that they are kept in."""

from __future__ import annotations

import json
from pathlib import Path

import click

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import json_option


@click.group()
def report() -> None:
    """Render what was measured in every form; nothing is measured again."""


@report.command()
@click.argument("path", metavar="REPORT.json", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), show_default="where the report is",
    help="Directory of the renderings; made if it is not there.",
)  # fmt: skip
@json_option
def render(path: Path, output: Path | None, as_json: bool) -> None:
    """Write report.html, report.md and report.xml from REPORT.json (or from that of a bundle) once more."""
    from glmexport.cli.signature import signed_report_path, telling_of_signature
    from glmexport.report.document import HTML_NAME, JUNIT_NAME, MARKDOWN_NAME
    from glmexport.report.write import render_report

    path = signed_report_path(path)
    directory = output or path.parent
    terminal = Terminal()
    with telling_of_signature(terminal, directory):
        written = render_report(path, directory)
    files = [str(directory / name) for name in (HTML_NAME, MARKDOWN_NAME, JUNIT_NAME)]
    terminal.facts("Report", {"report": str(path), "verdict": written.verdict, "written": "\n".join(files)})
    if as_json:
        document = {"report": str(path), "verdict": written.verdict, "files": files}
        emit(json.dumps(document, indent=2, ensure_ascii=False))


@report.command()
@json_option
def schema(as_json: bool) -> None:
    """Print the JSON Schema (2020-12) of report.json on stdout; with or without --json."""
    from glmexport.report.document import schema_text

    emit(schema_text())
