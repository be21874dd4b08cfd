"""The gates as JUnit XML, which every CI server reads.

BLOCK is a failure and INCONCLUSIVE an error: a case that could not be decided must not look like one that passed, or
was skipped on purpose. WARN passes, with its words in the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from glmexport.foundation.untrusted import visible
from glmexport.report import text
from glmexport.results.gate import Gate
from glmexport.results.record import Verdict

if TYPE_CHECKING:
    from glmexport.report.document import Report


def render_junit(report: Report) -> str:
    """Render the gates of a report, one test case a gate, one suite a device; the same report gives the same text."""
    subject = report.subject
    facts = {
        "verdict": report.verdict,
        "target": subject.target,
        "policy": report.policy.source,
        "bundle_digest": subject.bundle_digest,
        "checkpoint_digest": subject.checkpoint_digest,
    }
    suites = Element("testsuites", {"name": "glmexport"})
    if report.devices:
        for device in report.devices:
            own = {**facts, "verdict": device.verdict, "device": device.name, "device_class": device.device_class}
            suite = _suite(f"{subject.bundle} on {device.name}", device.gates, own, subject.target)
            if device.failure:
                _failed(suite, device.failure, subject.target)
            suites.append(suite)
    else:
        suites.append(_suite(subject.bundle, report.gates, facts, subject.target))
    for count in ("tests", "failures", "errors", "skipped"):
        suites.set(count, str(sum(int(suite.get(count, "0")) for suite in suites)))
    indent(suites)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{tostring(suites, encoding="unicode")}\n'


def _suite(name: str, gates: Sequence[Gate], facts: Mapping[str, str], target: str) -> Element:
    verdicts = [gate.verdict for gate in gates]
    counts = {
        "tests": str(len(verdicts)),
        "failures": str(verdicts.count(Verdict.BLOCK)),
        "errors": str(verdicts.count(Verdict.INCONCLUSIVE)),
        "skipped": "0",
    }
    suite = Element("testsuite", {"name": visible(name), **counts})
    properties = SubElement(suite, "properties")
    for key, value in facts.items():
        SubElement(properties, "property", {"name": key, "value": visible(value)})
    for gate in gates:
        _case(suite, gate, target)
    return suite


def _failed(suite: Element, failure: str, target: str) -> None:
    """A device that did not answer is a case that could not be decided."""
    suite.set("tests", "1")
    suite.set("errors", "1")
    case = SubElement(suite, "testcase", {"classname": visible(target), "name": "The device answers", "time": "0"})
    SubElement(case, "error", {"type": Verdict.INCONCLUSIVE, "message": visible(failure)})


def _case(suite: Element, gate: Gate, target: str) -> None:
    name = gate.name + (f", {gate.language}" if gate.language else "")
    case = SubElement(suite, "testcase", {"classname": visible(target), "name": visible(name), "time": "0"})
    value, limit = text.value_and_limit(gate.value, gate.limit, gate.unit)
    message = visible(f"{value}, {gate.direction} {limit}: {text.sample(gate)}")
    if gate.verdict is Verdict.BLOCK:
        SubElement(case, "failure", {"type": gate.verdict, "message": message})
    elif gate.verdict is Verdict.INCONCLUSIVE:
        SubElement(case, "error", {"type": gate.verdict, "message": message})
    else:
        SubElement(case, "system-out").text = f"{gate.verdict}: {message}"
