"""The report as Markdown and as JUnit XML: complete, and nothing foreign in it means anything."""

from xml.etree import ElementTree

import pytest

from glmexport.bundle.manifest import REPORTS
from glmexport.report.document import HTML_NAME, JSON_NAME, JUNIT_NAME, MARKDOWN_NAME
from glmexport.report.junit import render_junit
from glmexport.report.markdown import render_markdown
from glmexport.results.record import Verdict

HOSTILE = "a|b\n# <script>alert(1)</script> [x](javascript:y) `z` \u202e\x00&amp;]]>"


def test_every_rendering_is_evidence_and_not_part_of_the_bundle():
    assert {JSON_NAME, HTML_NAME, MARKDOWN_NAME, JUNIT_NAME} == REPORTS


def cells(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_markdown_has_every_gate_and_language(report):
    page = render_markdown(report)
    assert page.startswith("# BLOCK: ")
    assert page == render_markdown(report)
    gates = page[page.index("## Gates") : page.index("## Quality")].splitlines()
    rows = [cells(line) for line in gates if line.startswith("| ")][2:]
    assert [row[5] for row in rows] == [f"**{gate.verdict}**" for gate in report.gates]
    assert rows[0][3] == "0.0114 to 0.0151"
    quality = page[page.index("## Quality") : page.index("## Free answers")].splitlines()
    rows = [cells(line) for line in quality if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [*(row.language for row in report.fidelity.languages), "all", "original, again"]
    assert report.subject.bundle_digest in page
    # Every table is one: each line has as many cells as its head.
    for block in page.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1


def test_foreign_text_means_nothing_to_markdown(report, changed):
    plain = render_markdown(report)
    names = ("bundle", "checkpoint", "adapter", "adapter_digest")
    subject = report.subject.model_copy(update=dict.fromkeys(names, HOSTILE))
    gates = tuple(gate.model_copy(update={"name": HOSTILE}) for gate in report.gates)
    page = render_markdown(changed(subject=subject, gates=gates, versions={HOSTILE: HOSTILE}, limits=(HOSTILE,)))
    assert "<" not in page.replace("\\<", "") and "](" not in page and "\u202e" not in page and "\x00" not in page
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert headings[1:] == [line for line in plain.splitlines() if line.startswith("#")][1:]
    rows = [sum(line.startswith("| ") for line in text.splitlines()) for text in (page, plain)]
    assert rows[0] == rows[1]


def test_markdown_has_the_answers(report, changed):
    page = render_markdown(report)
    section = page[page.index("## Free answers") : page.index("## Size")].splitlines()
    rows = [cells(line) for line in section if line.startswith("| ")]
    assert ["Answers that end in a loop", "27", "36", "12 worse, 3 better"] in rows
    languages = [row[0] for row in rows if len(row) == 8]
    assert languages == ["Language", "---", *(row.language for row in report.fidelity.languages)]
    assert "## Free answers" not in render_markdown(changed(behaviour=None))


def test_junit_fails_where_the_report_does(report):
    suites = ElementTree.fromstring(render_junit(report))
    (suite,) = suites
    cases = suite.findall("testcase")
    assert len(cases) == len(report.gates) == int(suite.get("tests"))
    for case, gate in zip(cases, report.gates, strict=True):
        found = [child.tag for child in case]
        assert found == {
            Verdict.BLOCK: ["failure"], Verdict.INCONCLUSIVE: ["error"],
            Verdict.PASS: ["system-out"], Verdict.WARN: ["system-out"],
        }[gate.verdict]  # fmt: skip
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("1", "1", "0")
    assert {item.get("name"): item.get("value") for item in suite.find("properties")}["verdict"] == "BLOCK"


@pytest.mark.parametrize("key", ["bundle", "target", "bundle_digest"])
def test_foreign_text_is_text_in_junit(report, changed, key):
    subject = report.subject.model_copy(update={key: HOSTILE})
    gates = tuple(gate.model_copy(update={"name": HOSTILE, "sample": HOSTILE}) for gate in report.gates)
    suites = ElementTree.fromstring(render_junit(changed(subject=subject, gates=gates)))
    assert len(suites[0].findall("testcase")) == len(report.gates)
    assert "<script>alert(1)</script>" in suites[0].find("testcase").get("name")
