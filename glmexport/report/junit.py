"""The gates as JUnit XML, which every CI server reads.

BLOCK is a failure and INCONCLUSIVE an error: a case that could not be decided must not look like one that passed, or
was skipped on purpose. WARN passes, with its words in the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from glmexport.report import text
from glmexport.validation.results import Gate, Verdict

if TYPE_CHECKING:
    from glmexport.report.document import Report


def render_junit(report: Report) -> str:
    """One test case a gate; the same report gives the same text."""
    verdicts = [gate.verdict for gate in report.gates]
    counts = {
        "tests": str(len(verdicts)),
        "failures": str(verdicts.count(Verdict.BLOCK)),
        "errors": str(verdicts.count(Verdict.INCONCLUSIVE)),
        "skipped": "0",
    }
    suites = Element("testsuites", {"name": "glmexport", **counts})
    suite = SubElement(suites, "testsuite", {"name": text.visible(report.subject.bundle), **counts})
    properties = SubElement(suite, "properties")
    facts = {
        "verdict": report.verdict,
        "target": report.subject.target,
        "policy": report.policy.source,
        "bundle_digest": report.subject.bundle_digest,
        "checkpoint_digest": report.subject.checkpoint_digest,
    }
    for name, value in facts.items():
        SubElement(properties, "property", {"name": name, "value": text.visible(value)})
    for gate in report.gates:
        _case(suite, gate, report.subject.target)
    indent(suites)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{tostring(suites, encoding="unicode")}\n'


def _case(suite: Element, gate: Gate, target: str) -> None:
    name = gate.name + (f", {gate.language}" if gate.language else "")
    case = SubElement(suite, "testcase", {"classname": text.visible(target), "name": text.visible(name), "time": "0"})
    value, limit = text.value_and_limit(gate.value, gate.limit, gate.unit)
    message = text.visible(f"{value}, {gate.direction} {limit}: {text.sample(gate)}")
    if gate.verdict is Verdict.BLOCK:
        SubElement(case, "failure", {"type": gate.verdict, "message": message})
    elif gate.verdict is Verdict.INCONCLUSIVE:
        SubElement(case, "error", {"type": gate.verdict, "message": message})
    else:
        SubElement(case, "system-out").text = f"{gate.verdict}: {message}"
