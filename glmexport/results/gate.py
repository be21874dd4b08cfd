"""A limit, and what was measured against it."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import model_validator

from glmexport.foundation.definition import Count, Number
from glmexport.results.record import Record, Verdict


class Gate(Record):
    """A limit, what was measured against it, and what follows."""

    name: str
    language: str | None
    """BCP-47 tag of the texts, or none if the gate is not about a language."""
    value: Number
    limit: Number
    unit: str
    direction: Literal["at most", "at least"]
    """The side of the limit that the value has to be on; the limit itself is allowed."""
    sample: str
    """The sample that the value rests on, for example "1 024 positions in 12 documents"."""
    verdict: Verdict
    lower: Number | None = None
    """Lower bound: the true value is below it in one case of 1 / (1 - confidence); none for what is counted, not
    estimated."""
    upper: Number | None = None
    """Upper bound: the true value is above it in one case of 1 / (1 - confidence); none for what is counted, not
    estimated."""
    confidence: Number | None = None
    """Confidence of each bound by itself, 0 to 1."""
    documents_needed: Count | None = None
    """Size of the sample for an INCONCLUSIVE gate: with about so many documents of the same kind it would be decided in
    four of five cases, if the value is the true one; none if that cannot be said."""
    needed_unit: str = "documents"
    """The unit that ``documents_needed`` counts: documents, answers, sentences or tasks."""

    @property
    def holds(self) -> bool:
        """Whether the value is finite and on the allowed side of the limit."""
        if not math.isfinite(self.value):
            return False
        return self.value <= self.limit if self.direction == "at most" else self.value >= self.limit

    @model_validator(mode="after")
    def _bounds_are_two(self) -> Self:
        if (self.lower is None) != (self.upper is None):
            raise ValueError("give lower and upper, or neither")
        return self

    @model_validator(mode="after")
    def _verdict_follows_from_value(self) -> Self:
        if self.verdict is Verdict.PASS and not self.holds:
            raise ValueError(f"verdict PASS, but {self.value} is not {self.direction} {self.limit}")
        bound = self.upper if self.direction == "at most" else self.lower
        if self.verdict is Verdict.PASS and bound is not None:
            sure = bound <= self.limit if self.direction == "at most" else bound >= self.limit
            if not sure:
                raise ValueError(f"verdict PASS, but the bound {bound} is not {self.direction} {self.limit}")
        return self
