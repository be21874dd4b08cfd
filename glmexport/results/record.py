"""The base of every result: immutable records, numbers that may be missing, and the four verdicts.

A measurement of a badly broken bundle can be NaN or infinite, and its report has to exist nevertheless.
``Number`` therefore admits both, and JSON carries them as the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum

from pydantic import ConfigDict

from glmexport.foundation.definition import Definition


class Record(Definition):
    """Base of every result: immutable, an unknown key is an error, and the schema carries the units."""

    model_config = ConfigDict(use_attribute_docstrings=True, ser_json_inf_nan="strings")


class Verdict(StrEnum):
    """The decision of one gate, or of all gates together."""

    PASS = "PASS"  # noqa: S105  # not a password
    WARN = "WARN"
    BLOCK = "BLOCK"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def severity(self) -> int:
        """The severity from 0 for PASS up to 3 for BLOCK; not being able to tell is worse than a warning."""
        return (Verdict.PASS, Verdict.WARN, Verdict.INCONCLUSIVE, Verdict.BLOCK).index(self)


def badness(value: float) -> float:
    """Return a key that orders measurements by how bad they are: what is not a number is worse than every number."""
    return math.inf if math.isnan(value) else value


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the most severe verdict; INCONCLUSIVE if there is none, because nothing was checked."""
    return max(verdicts, key=lambda verdict: verdict.severity, default=Verdict.INCONCLUSIVE)
