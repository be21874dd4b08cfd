"""Several devices in every rendering: a column for each class, and nobody who did not run looks as if they had."""

import io
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError
from rich.console import Console
from sample_report import ATTACK, with_devices

from glmexport.cli.verdict import show
from glmexport.report.compare import compare
from glmexport.report.devices import EMULATED, FAILED, device_table
from glmexport.report.document import Report
from glmexport.report.html import render_html
from glmexport.report.junit import render_junit
from glmexport.report.markdown import render_markdown
from glmexport.results.record import Verdict


@pytest.fixture
def devices(report):
    return with_devices(report)


def test_a_column_for_each_class(devices, report):
    table = device_table(devices)
    assert table.classes == ("arm-edge", "qemu-arm64", "lost")
    assert table.verdicts == (Verdict.BLOCK, Verdict.BLOCK, Verdict.INCONCLUSIVE)
    rows = dict(table.rows)
    assert rows["Devices"][0] == "edge-1, edge-2"
    assert rows["Processor"] == ("Cortex-A78", "aarch64", FAILED)
    assert rows["Decode"][1:] == (EMULATED, FAILED) and "tokens/s" in rows["Decode"][0]
    assert len([name for name in rows if name.startswith("Mean divergence, ")]) == len(report.subject.languages) + 1
    assert len(table.notes) == 3
    assert device_table(report) is None


def test_the_worst_of_a_class_speaks(devices):
    edge, slower, *others = devices.devices
    bad = slower.fidelity.overall.model_copy(update={"kl_mean_nats": float("nan"), "top1_agreement": 0.25})
    slower = slower.model_copy(update={"fidelity": slower.fidelity.model_copy(update={"overall": bad})})
    rows = dict(device_table(devices.model_copy(update={"devices": (edge, slower, *others)})).rows)
    assert rows["Mean divergence, nats"][0] == "not a number" and rows["Same next token"][0].startswith("25.0")


def test_every_rendering_has_them(devices):
    stream = io.StringIO()
    show(Console(file=stream, width=200), devices, Path("bundle"))
    for page in (render_html(devices), render_markdown(devices), stream.getvalue()):
        assert "edge-1, edge-2" in page.replace("\\", "") and "correctness only" in page and "no answer" in page
        assert "It was hot" in page
    assert ATTACK not in render_html(devices) and ATTACK not in render_markdown(devices)


def test_junit_has_a_suite_for_each(devices):
    suites = ElementTree.fromstring(render_junit(devices).split("\n", 1)[1])
    assert len(suites) == 4 and [len(suite.findall("testcase")) for suite in suites][-1] == 1
    assert suites[3].find("testcase/error").get("message").endswith("burned down.")
    assert suites.get("errors") == str(sum(int(suite.get("errors")) for suite in suites))


def test_a_report_without_speed(devices, report):
    absent = report.model_copy(update={"performance": None, "performance_absent_because": "Emulated by QEMU."})
    absent = Report.model_validate(dict(absent))
    stream = io.StringIO()
    show(Console(file=stream, width=200), absent, Path("bundle"))
    for page in (render_html(absent), render_markdown(absent), stream.getvalue()):
        assert "was not measured" in page and "Emulated by QEMU" in page.replace("\\", "")
    found = compare(report, absent)
    assert not [change for change in found.changes if change.kind == "speed"]


@pytest.mark.parametrize(
    "changes",
    [
        {"detailed": None},
        {"detailed": ATTACK},
        {"verdict": Verdict.PASS},
        {"performance": None},
        {"performance_absent_because": "No reason."},
    ],
)
def test_a_report_that_contradicts_itself(devices, changes):
    with pytest.raises(ValidationError):
        Report.model_validate({**dict(devices), **changes})


def test_a_device_that_contradicts_itself(devices):
    edge, *_ = devices.devices
    for changes in ({"failure": "x"}, {"facts": None}, {"performance_absent_because": "x"}, {"verdict": Verdict.PASS}):
        with pytest.raises(ValidationError):
            type(edge).model_validate({**dict(edge), **changes})
