"""Whatever reading a report accepts can be rendered and compared: reports come from elsewhere, and from other days."""

import contextlib
import copy
import io
import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console
from sample_report import groups, make_report, with_devices

from glmexport.cli.verdict import show
from glmexport.foundation.errors import InputError
from glmexport.report.compare import compare
from glmexport.report.document import Report
from glmexport.report.html import render_html
from glmexport.report.junit import render_junit
from glmexport.report.markdown import render_markdown

VALUES = (None, 0, -1, 1, "NaN", "Infinity", "-Infinity", 1e308, 1e-300, 10**30, "", "\ud7ff\u202e", [], {}, False)


def whole():
    report = make_report(layers=2)
    linears = report.quantization.linears
    quantization = report.quantization.model_copy(update={"groups": groups(linears)})
    return with_devices(report.model_copy(update={"quantization": quantization}))


REPORT = whole()
TABLE = json.loads(REPORT.model_dump_json())


def places(value, path=()):
    """Paths to every key, and into the first two elements of every list."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(list(places(TABLE))), st.sampled_from(VALUES))
def test_a_report_with_any_value_anywhere(path, value):
    table = copy.deepcopy(TABLE)
    place = table
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    try:
        report = Report.model_validate_json(json.dumps(table))
    except ValidationError:
        return
    for render in (render_html, render_markdown, render_junit):
        assert render(report)
    show(Console(file=io.StringIO(), width=140), report, Path("bundle"))
    for old, new in ((REPORT, report), (report, REPORT), (report, report)):
        # Without a language in common.
        with contextlib.suppress(InputError):
            comparison = compare(old, new)
            assert comparison.outcome in ("no worse", "worse", "undecided")
            assert type(comparison).model_validate_json(comparison.model_dump_json())
