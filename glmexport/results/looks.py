"""Records of the part of the evaluation text that was judged, where a language may be decided before its text ends."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, model_validator

from glmexport.foundation.definition import Count, Number
from glmexport.results.record import Record


class Look(Record):
    """A point of a language's text at which its gates may be decided."""

    documents: Count
    """Documents of the language up to this look."""
    positions: Count
    """Positions in these documents."""
    level: Number
    """Level of each one-sided test at this look, 0 to 1. They are chosen so that a wrong decision at any look of the
    language is no more frequent than 1 - confidence."""


class LanguageLooks(Record):
    """The looks at the text of one language, planned before anything was measured."""

    language: str
    planned: Annotated[tuple[Look, ...], Field(min_length=1)]
    """Every look, the last one at all the text."""
    taken: Annotated[int, Field(ge=1)]
    """Number of looks that were taken: the language ended with the first at which all its gates were decided."""

    @model_validator(mode="after")
    def _looks_grow(self) -> Self:
        if self.taken > len(self.planned):
            raise ValueError(f"{self.taken} looks were taken of {len(self.planned)}")
        if any(not before.documents < after.documents for before, after in pairwise(self.planned)):
            raise ValueError("a look has no more documents than the one before it")
        return self

    @property
    def last(self) -> Look:
        """The last look that was taken."""
        return self.planned[self.taken - 1]

    @property
    def ended_early(self) -> bool:
        """Whether some of the language's text was not judged."""
        return self.taken < len(self.planned)

    @property
    def whole(self) -> Look:
        """The look at all the text."""
        return self.planned[-1]
