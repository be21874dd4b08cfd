"""Records of the scores of the original and of the bundle on the same tasks."""

from __future__ import annotations

from pydantic import Field

from glmexport.foundation.definition import Count, Number
from glmexport.results.record import Record


class Paired(Record):
    """The scores of the bundle less those of the original, task by task."""

    tasks: Count
    mean_difference: Number
    standard_error: Number
    """Standard error of the mean difference; Infinity for a single task."""
    lost: Count
    """Tasks with a lower score than the original's."""
    gained: Count
    """Tasks with a higher score."""
    mcnemar_p: float | None = Field(default=None, ge=0, le=1)
    """Chance of so uneven a split of lost and gained, or a more uneven one, if neither were likelier; two-sided. None
    where scores are not all 0 or 1."""
    lower_bound: Number
    """The true mean difference is below it in at most one case of 1 / (1 - confidence): the bundle is no worse than
    the original by more than the bound."""
    upper_bound: Number
    """The true mean difference is above it in at most one case of 1 / (1 - confidence)."""
    confidence: Number
    """Confidence of each bound by itself, 0 to 1."""
    flips: tuple[str, ...]
    """Ids of the tasks whose score changed, in order."""
