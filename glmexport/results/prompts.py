"""Records of whether conversations reach the bundle as the tokens that the original would see."""

from __future__ import annotations

from glmexport.foundation.definition import Count
from glmexport.results.record import Record


class PromptDifference(Record):
    """A conversation that the bundle turns into other tokens than the original."""

    conversation: str
    language: str
    expected: str
    """The original's text around the first token that differs, or why its template refuses."""
    given: str
    """The bundle's text around the same place, or why its template refuses."""


class PromptParity(Record):
    """The comparison of golden conversations: the bundle's token ids against transformers' on the original."""

    compared: Count
    refused: Count
    """Conversations of a kind that both templates refuse."""
    differences: tuple[PromptDifference, ...]
    unopened: str | None = None
    """The reason why transformers could not open the original's tokenizer, and so nothing was compared; None if it
    could."""
