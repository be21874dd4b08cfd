"""What validation measures: the vocabulary between the measurements, the gates and the report.

A measurement of a badly broken bundle can be NaN or infinite, and its report has to exist nevertheless.
``Number`` therefore admits both, and JSON carries them as the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, WithJsonSchema, model_validator

from glmexport.definition import Definition

Number = Annotated[
    float,
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}),
]
Count = Annotated[int, Field(ge=0)]


class Record(Definition):
    """Base of every result: immutable, an unknown key is an error, and the schema carries the units."""

    model_config = ConfigDict(use_attribute_docstrings=True, ser_json_inf_nan="strings")


class Verdict(StrEnum):
    """What a gate decides, and what the gates together decide."""

    PASS = "PASS"  # noqa: S105  # not a password
    WARN = "WARN"
    BLOCK = "BLOCK"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def severity(self) -> int:
        """0 for PASS up to 3 for BLOCK; not being able to tell is worse than a warning."""
        return (Verdict.PASS, Verdict.WARN, Verdict.INCONCLUSIVE, Verdict.BLOCK).index(self)


def badness(value: float) -> float:
    """Key that orders measurements by how bad they are: what is not a number is worse than every number."""
    return math.inf if math.isnan(value) else value


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The most severe verdict; INCONCLUSIVE if there is none, because nothing was checked."""
    return max(verdicts, key=lambda verdict: verdict.severity, default=Verdict.INCONCLUSIVE)


class Estimate(Record):
    """A mean over positions, and how sure it is."""

    value: Number
    standard_error: Number
    """With documents as the sample, whose positions hang together; Infinity for a single document."""
    documents: Count
    positions: Count
    kind: Literal["signed", "positive", "share"]
    """Signed quantities have symmetric errors. What is never negative, and rarely large, has them on a logarithmic
    scale; so has a share of positions that have something rare."""


class LanguageFidelity(Record):
    """How far the bundle's next-token distribution is from the original's, on texts of one language.

    Divergence is KL(original || bundle) at one position, both reading the same preceding text.
    """

    language: str
    """BCP-47 tag; "all" for every language together."""
    documents: Count
    positions: Count
    """Positions at which both distributions were compared."""
    perplexity_original: Number
    perplexity_bundle: Number
    kl_mean_nats: Number
    kl_p50_nats: Number
    kl_p99_nats: Number
    kl_p999_nats: Number
    kl_max_nats: Number
    top1_agreement: Annotated[float, Field(ge=0, le=1)]
    """Share of positions at which both have the same most likely token, 0 to 1."""
    rms_delta_p: Number
    """Root of the mean square change of the probability of the text's own next token, 0 to 1."""
    kl: Estimate
    """Of the mean divergence, in nats."""
    ln_perplexity_ratio: Estimate
    """Of ln(perplexity of the bundle / of the original), in nats; paired, position by position."""
    top1_disagreement: Estimate
    """Of the share of positions with different most likely tokens."""


class PositionBand(Record):
    """Predictions that rest on about as much text before them, over every language."""

    first: Count
    """Index of the predicted token in its document, from 0."""
    last: Count
    """The last index that was measured."""
    kl: Estimate
    """Of the mean divergence, in nats."""
    top1_agreement: Annotated[float, Field(ge=0, le=1)]


class WorstToken(Record):
    """One position at which the bundle diverges most, with what a reader needs to judge it."""

    language: str
    document: str
    position: Count
    """Index of the predicted token in the document, from 0."""
    context: str
    """The text right before the position."""
    expected: str
    """The original's most likely next token."""
    given: str
    """The bundle's most likely next token."""
    kl_nats: Number
    probability_original: Number
    """The original's probability of ``expected``, 0 to 1."""
    probability_bundle: Number
    """The bundle's probability of ``expected``, 0 to 1."""


class Fidelity(Record):
    """The bundle's answers against the original's on evaluation text that calibration has not seen."""

    languages: tuple[LanguageFidelity, ...]
    overall: LanguageFidelity
    worst_language: str
    """Language of the largest mean divergence."""
    kl_histogram_edges_nats: tuple[Number, ...]
    """Increasing, one more than the counts; the first may be 0 and the last Infinity."""
    kl_histogram_counts: tuple[Count, ...]
    """Positions in each bin, over every language."""
    worst_tokens: tuple[WorstToken, ...]
    arithmetic: str
    """What the bundle computes in, for example "int4 weights, int8 activations (accuracy_level 4)"."""
    bands: tuple[PositionBand, ...] = ()
    """By how far into its document a position is."""
    noise_floor: LanguageFidelity | None = None
    """The original against itself with another batch and number of threads, on one text a language: what is not above
    this is no difference. None if it was not measured."""

    @model_validator(mode="after")
    def _histogram_is_well_formed(self) -> Self:
        edges, counts = self.kl_histogram_edges_nats, self.kl_histogram_counts
        if counts and len(edges) != len(counts) + 1:
            raise ValueError(f"{len(counts)} histogram counts need {len(counts) + 1} edges, not {len(edges)}")
        if any(not left < right for left, right in pairwise(edges)):
            raise ValueError("histogram edges do not increase")
        return self

    @model_validator(mode="after")
    def _worst_language_was_measured(self) -> Self:
        if self.languages and self.worst_language not in {row.language for row in self.languages}:
            raise ValueError(f"worst_language {self.worst_language!r} is not among the languages")
        return self


class PromptDifference(Record):
    """A conversation that the bundle turns into other tokens than the original."""

    conversation: str
    language: str
    expected: str
    """The original's text around the first token that differs, or why its template refuses."""
    given: str
    """The bundle's."""


class PromptParity(Record):
    """Token ids of golden conversations: the bundle's tokenizer and template against transformers on the original."""

    compared: Count
    refused: Count
    """Conversations of a kind that both templates refuse."""
    differences: tuple[PromptDifference, ...]
    unopened: str | None = None
    """Why transformers could not open the original's tokenizer; then nothing was compared."""


class Share(Record):
    """What one cause adds to the mean divergence; the shares are measured apart and add up."""

    name: str
    """For example "4-bit linears, fp32 arithmetic" or "+ int8 activations"."""
    kl_mean_nats: Number
    """Mean divergence that this cause adds to the causes before it; can be negative."""
    note: str


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


class Gate(Record):
    """A limit, what was measured against it, and what follows."""

    name: str
    language: str | None
    """BCP-47 tag of the texts, or none if the gate is not about a language."""
    value: Number
    limit: Number
    unit: str
    direction: Literal["at most", "at least"]
    """On which side of the limit the value has to be; the limit itself is allowed."""
    sample: str
    """What the value rests on, for example "1 024 positions in 12 documents"."""
    verdict: Verdict
    lower: Number | None = None
    """The true value is below in one case of 1 / (1 - confidence); none for what is counted, not estimated."""
    upper: Number | None = None
    """The same, above."""
    confidence: Number | None = None
    """Of each bound by itself, 0 to 1."""
    documents_needed: Count | None = None
    """For an INCONCLUSIVE gate: with about so many documents of the same kind it would be decided in four of five
    cases, if the value is the true one; none if that cannot be said."""

    @property
    def holds(self) -> bool:
        """Whether the value is finite and on the allowed side of the limit."""
        if not math.isfinite(self.value):
            return False
        return self.value <= self.limit if self.direction == "at most" else self.value >= self.limit

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


class Overlap(Record):
    """Whether evaluation repeats what calibration has seen, which would flatter the bundle."""

    calibration_documents: Count
    evaluation_documents: Count
    shared_documents: Count
    shared_lines: Count
    """Distinct lines that occur in both."""
