"""How fast, and within which bounds."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from glmexport.validation.results.record import Count, Number, Record


class Speed(Record):
    """One runtime on the validated machine; every time and rate is the median over the repetitions."""

    runtime: str
    threads: Annotated[int, Field(ge=1)]
    load_s: Number
    ttft_s: Number
    """Time to first token: from the prompt's token ids to the first generated token."""
    prefill_tokens_per_s: Number
    decode_tokens_per_s: Number
    peak_memory_bytes: Count


class Performance(Record):
    """Speed of the bundle, of the original where it fits, and the bound that no software can pass."""

    prompt_tokens: Count
    generated_tokens: Count
    repetitions: Annotated[int, Field(ge=1)]
    original: Speed | None
    original_absent_because: str | None
    bundle: Speed
    memory_bandwidth_bytes_per_s: Number
    """Measured on this machine, reading."""
    bytes_read_per_token: Count
    """Weights and cache that one decoded token reads at least."""
    roofline_decode_tokens_per_s: Number
    """Memory bandwidth over bytes read per token: the upper bound of decoding one sequence."""

    @model_validator(mode="after")
    def _absence_has_a_reason(self) -> Self:
        if (self.original is None) == (self.original_absent_because is None):
            raise ValueError("give either the original's speed or original_absent_because")
        return self
