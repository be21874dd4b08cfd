"""Every text of a report is somebody's: none of it is more than text in what the report is rendered as."""

from __future__ import annotations

import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError
from sample_report import groups, make_report, with_devices

from glmexport.cli.console import PlainConsole
from glmexport.cli.verdict import show
from glmexport.report.document import Report
from glmexport.report.html import render_html
from glmexport.report.junit import render_junit
from glmexport.report.markdown import render_markdown

HOSTILE = "<img src=x onerror=alert(1)>|`\n# [a](http://b)\x1b[2J\x9b31m\u202e[/][bold]"


def texts(value, path=()):
    """Paths to every text that is no key."""
    if isinstance(value, str):
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from texts(inner, (*path, key))


def replaced(table, path, text):
    table = copy.deepcopy(table)
    place = table
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = text
    return table


@pytest.fixture(scope="module")
def hostile():
    """A report whose every text is hostile that may be any."""
    report = make_report(layers=1)
    quantization = report.quantization.model_copy(update={"groups": groups(report.quantization.linears)})
    table = json.loads(with_devices(report.model_copy(update={"quantization": quantization})).model_dump_json())
    count = 0
    for path in texts(table):
        # Names that have to agree with others keep doing so.
        changed = replaced(table, path, f"{HOSTILE}{path[-1] if 'name' in str(path[-1]) else ''}")
        try:
            Report.model_validate_json(json.dumps(changed))
        except ValidationError:
            continue
        table, count = changed, count + 1
    assert count > 60
    return Report.model_validate_json(json.dumps(table))


def test_markdown(hostile):
    content = render_markdown(hostile)
    assert not re.search(r"(?<!\\)<img", content)
    assert not re.search(r"^# \[", content, re.MULTILINE)
    assert not re.search(r"(?<!\\)\]\(http", content)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", content)
    for block in content.split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith("|"):
            # A cell more would be a pipe that was not ours.
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, block


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_html(hostile):
    content = render_html(hostile)
    parser = Elements()
    parser.feed(content)
    assert not [tag for tag, _ in parser.found if tag == "img"]
    assert not [name for _, attributes in parser.found for name in attributes if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", content)


def test_junit(hostile):
    content = render_junit(hostile)
    assert {element.tag for element in ElementTree.fromstring(content).iter()} <= {
        "testsuites", "testsuite", "properties", "property", "testcase", "failure", "error", "system-out",
    }  # fmt: skip
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", content)


def test_terminal(hostile):
    console = PlainConsole()
    console.file = io.StringIO()
    show(console, hostile, Path("bundle"))
    shown = console.file.getvalue()
    assert "<img" in shown and "[bold]" in shown
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
