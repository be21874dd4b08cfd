"""Records of whether the original that a bundle is compared with is the model that transformers loads."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from glmexport.foundation.definition import Count, Number
from glmexport.results.record import Record


class ReferenceCheck(Record):
    """The comparison of one text's logits, computed block by block, with transformers' whole model in fp32."""

    positions: Count
    """Number of positions of the text; 0 where the check was not made."""
    max_difference: Number | None = None
    """Largest difference of two logits; none where the check was not made."""
    limit: Number | None = None
    """Largest difference that the arithmetic of fp32 explains: a share of the largest logit."""
    absent_because: str | None = None
    """The reason why the check was not made; None if it was."""

    @model_validator(mode="after")
    def _absence_has_a_reason(self) -> Self:
        measured = self.max_difference is not None and self.limit is not None and self.positions > 0
        if measured == (self.absent_because is not None):
            raise ValueError("give either what was measured or absent_because")
        return self
