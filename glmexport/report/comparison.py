"""The record that ``compare`` fills in: what became of a bundle between two reports."""

from __future__ import annotations

from typing import Literal

from glmexport.foundation.definition import Count, Number
from glmexport.results.record import Record, Verdict

Outcome = Literal["no worse", "worse", "undecided"]


class ComparedReport(Record):
    """One of the two reports."""

    bundle: str
    bundle_digest: str
    verdict: Verdict


class DifferingFact(Record):
    """A fact beside the measurements that is not the same in both."""

    name: str
    old: str
    new: str


class Change(Record):
    """One figure in both reports."""

    kind: Literal["fidelity", "speed", "size"]
    name: str
    language: str | None
    """BCP-47 tag, "all" for every language together; none for what has no language."""
    unit: str
    old: Number
    new: Number
    scale: Literal["difference", "ratio"]
    change: Number
    """The new figure less the old one, in ``unit``, or the new one over the old one: see ``scale``."""
    lower: Number | None
    """Lower bound of the change, on the scale of ``change``. The true one is below ``lower`` or above ``upper`` in one
    case of 1 / (1 - confidence), the samples of both taken as independent; none for what is counted, or has no
    bounds."""
    upper: Number | None
    p_value: Number | None
    """Chance of a change this large in either direction if there were none; 1 for one that is no larger than what the
    original differs from itself; none if it was not tested."""
    significant: bool
    """Whether a test found the change, corrected for the number of tests (Holm)."""
    worse: bool
    """Whether the change is in the unfavourable direction, however small."""
    undecided: bool = False
    """Whether the change is not significant, but a worsening as large as all that the policy allows cannot be
    excluded."""
    decides: bool
    """Whether a significant worsening makes the comparison worse."""


class GateChange(Record):
    """A gate whose gravest verdict over the languages changed."""

    name: str
    old: Verdict | None
    """The gravest verdict in the old report; None where the gate was not applied."""
    new: Verdict | None
    languages: tuple[str, ...]
    """BCP-47 tags where it is ``new`` now; empty for a gate without languages."""


class Comparison(Record):
    """The comparison of two reports, figure by figure."""

    schema_version: Literal[1] = 1
    outcome: Outcome
    reasons: tuple[str, ...]
    """The reasons for the outcome, in words; empty for "no worse"."""
    old: ComparedReport
    new: ComparedReport
    differing: tuple[DifferingFact, ...]
    changes: tuple[Change, ...]
    """Every figure that both have, changed or not."""
    gates: tuple[GateChange, ...]
    tests: Count
    confidence: Number
    """Confidence of the intervals, 0 to 1; 1 less it is the chance of a single wrong significant change among all
    tests."""
    remarks: tuple[str, ...]
    """Remarks on what was not compared, or how far the comparison goes; one sentence or two each."""
