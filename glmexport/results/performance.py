"""Records of speed: how fast, how sure that is, within which bounds, and on which execution provider."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from glmexport.foundation.definition import Count, Number
from glmexport.results.record import Record


class Interval(Record):
    """A median over rounds, or the ratio of two over paired rounds, and how sure it is."""

    value: Number
    lower: Number
    """Lower bound: the true value is below it in one case of 1 / (1 - confidence), by bootstrap over rounds; 0 where
    the rounds are too few to tell."""
    upper: Number
    """Upper bound: the true value is above it in one case of 1 / (1 - confidence), by bootstrap over rounds; Infinity
    where the rounds are too few to tell."""
    confidence: Number
    """Confidence of each bound by itself, 0 to 1."""
    n: Count
    """Number of rounds."""


class Figure(Interval):
    """A median, and what the worst rounds came to."""

    p90: Number | None
    """Value that nine of ten rounds are no worse than, with 99 % confidence: of times a high order statistic, of rates
    a low one. None below 64 rounds."""
    p99: Number | None
    """Value that 99 of 100 rounds are no worse than, with 99 % confidence; None below 662 rounds."""


class Speed(Record):
    """The speed of one runtime on the validated machine, in a process of its own."""

    runtime: str
    threads: Annotated[int, Field(ge=1)] | None
    """Number of threads; None where nobody tells."""
    load_s: Figure
    """Time from nothing of the runtime imported to a model that can be asked; with the files in the system's cache."""
    ttft_s: Figure
    """Time to first token: from the prompt's token ids to the first generated token."""
    prefill_tokens_per_s: Figure
    """Prompt tokens over the time to first token."""
    decode_tokens_per_s: Figure
    """Speed of the generated tokens after the first."""
    peak_memory_bytes: Count | None
    """Peak memory of the process, loading included; None where nothing tells it."""
    peak_memory_source: str
    """The source of the peak memory, for example "VmHWM" (Linux, peak resident memory), or the reason why there is
    none."""
    energy_j_per_token: Figure | None
    """Energy of processor packages and memory over the decoded tokens, whatever else ran meanwhile included; None where
    the machine does not tell."""
    energy_absent_because: str | None

    @model_validator(mode="after")
    def _absence_has_a_reason(self) -> Self:
        if (self.energy_j_per_token is None) == (self.energy_absent_because is None):
            raise ValueError("give either energy_j_per_token or energy_absent_because")
        return self


class SpeedRatios(Record):
    """Ratios of the bundle over the original. Rounds were taken in turns, so both sides saw the same machine."""

    ttft_s: Interval
    prefill_tokens_per_s: Interval
    decode_tokens_per_s: Interval
    energy_j_per_token: Interval | None


class PlacedOperators(Record):
    """The nodes of one type on one execution provider."""

    provider: str
    operator: str
    nodes: Count


class Placement(Record):
    """The execution provider of every node, from ONNX Runtime's own profile of a short generation."""

    provider: str
    """The target's execution provider."""
    operators: tuple[PlacedOperators, ...]
    on_purpose: tuple[str, ...]
    """Nodes on the CPU beside another provider that compute shapes: ONNX Runtime keeps these few integers there, since
    moving them would cost more."""
    unexpected: tuple[str, ...]
    """All other nodes that did not run on the target's provider, each with its operator and where it ran."""

    @property
    def nodes(self) -> int:
        """The number of all nodes."""
        return sum(row.nodes for row in self.operators)


class Performance(Record):
    """The speed of the bundle, of the original where it fits, and the bound that no software can pass."""

    prompt_tokens: Count
    generated_tokens: Count
    rounds: Annotated[int, Field(ge=1)]
    """Number of rounds. In each, every runtime read the prompt and generated once; who was first changed from round to
    round."""
    original: Speed | None
    original_absent_because: str | None
    bundle: Speed
    ratios: SpeedRatios | None
    """Ratios of the bundle over the original; None where the original was not measured."""
    placement: Placement
    memory_bandwidth_bytes_per_s: Number | None
    """Memory bandwidth of reading, as measured on this machine; None where it cannot be."""
    bytes_read_per_token: Count
    """Bytes of weights and cache that one decoded token reads at least."""
    roofline_decode_tokens_per_s: Number | None
    """Memory bandwidth over bytes read per token: the upper bound of decoding one sequence."""

    @model_validator(mode="after")
    def _absence_has_a_reason(self) -> Self:
        if (self.original is None) == (self.original_absent_because is None):
            raise ValueError("give either the original's speed or original_absent_because")
        if (self.original is None) != (self.ratios is None):
            raise ValueError("ratios are there exactly where the original's speed is")
        return self
