"""Records of how far the bundle's answers are from the original's."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from glmexport.foundation.definition import Count, Number
from glmexport.results.looks import LanguageLooks
from glmexport.results.record import Record


class Estimate(Record):
    """A mean over positions, and how sure it is."""

    value: Number
    standard_error: Number
    """Standard error with documents as the sample, whose positions hang together; Infinity for a single document."""
    documents: Count
    positions: Count
    kind: Literal["signed", "positive", "share"]
    """Kind of the quantity. Signed quantities have symmetric errors. Those that are never negative, and rarely large,
    have them on a logarithmic scale; so has a share of positions that have something rare."""


class LanguageFidelity(Record):
    """The distance of the bundle's next-token distribution from the original's, on texts of one language.

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
    """Estimate of the mean divergence, in nats."""
    ln_perplexity_ratio: Estimate
    """Estimate of ln(perplexity of the bundle / of the original), in nats; paired, position by position."""
    top1_disagreement: Estimate
    """Estimate of the share of positions with different most likely tokens."""


class PositionBand(Record):
    """The predictions of every language that rest on about as much text before them."""

    first: Count
    """Index of the predicted token in its document, from 0."""
    last: Count
    """The last index that was measured."""
    kl: Estimate
    """Estimate of the mean divergence, in nats."""
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


class CaptureBound(Record):
    """The cost of knowing the original by its most likely tokens only, measured where all are known."""

    top_k: Count
    """Number of tokens kept at each position; of all others only what they have together."""
    tail_mass: Annotated[float, Field(ge=0, le=1)]
    """Mean probability of all other tokens together."""
    audit_positions: Count
    """Positions at which the original's whole distribution was kept."""
    kl_mean_nats: Number
    """Mean divergence at these positions, over the whole vocabulary."""
    kl_mean_partition_nats: Number
    """Mean divergence at these positions over the kept tokens and all others as one, which is never more."""


class Fidelity(Record):
    """The comparison of the bundle's answers with the original's on evaluation text that calibration has not seen."""

    languages: tuple[LanguageFidelity, ...]
    overall: LanguageFidelity
    worst_language: str
    """Language of the largest mean divergence."""
    kl_histogram_edges_nats: tuple[Number, ...]
    """Edges of the bins, increasing, one more than the counts; the first may be 0 and the last Infinity."""
    kl_histogram_counts: tuple[Count, ...]
    """Number of positions in each bin, over every language."""
    worst_tokens: tuple[WorstToken, ...]
    arithmetic: str
    """The arithmetic that the bundle computes in, for example "int4 weights, int8 activations (accuracy_level 4)"."""
    bands: tuple[PositionBand, ...] = ()
    """Figures by how far into its document a position is."""
    noise_floor: LanguageFidelity | None = None
    """The original against itself with another batch and number of threads, on one text a language: what is not above
    this is no difference. None if it was not measured."""
    capture: CaptureBound | None = None
    """The cost of an original that was captured earlier: every divergence above is a lower bound. None if it was at
    hand."""
    text_digest: str = ""
    """SHA-256 over the documents, their languages and token ids, those of all looks: the same where two reports rest on
    the same text, if their languages ended at the same looks."""
    looks: tuple[LanguageLooks, ...] = ()
    """The part of each language's text that was judged; empty where all was judged at once."""

    @model_validator(mode="after")
    def _histogram_is_well_formed(self) -> Self:
        edges, counts = self.kl_histogram_edges_nats, self.kl_histogram_counts
        if counts and len(edges) != len(counts) + 1:
            raise ValueError(f"{len(counts)} histogram counts need {len(counts) + 1} edges, not {len(edges)}")
        if any(not left < right for left, right in pairwise(edges)):
            raise ValueError("histogram edges do not increase")
        return self

    @model_validator(mode="after")
    def _looks_are_of_what_was_judged(self) -> Self:
        if self.looks:
            judged = {looks.language: (looks.last.documents, looks.last.positions) for looks in self.looks}
            if judged != {row.language: (row.documents, row.positions) for row in self.languages}:
                raise ValueError("the looks are not those of the documents that were judged")
        return self

    @model_validator(mode="after")
    def _worst_language_was_measured(self) -> Self:
        if self.languages and self.worst_language not in {row.language for row in self.languages}:
            raise ValueError(f"worst_language {self.worst_language!r} is not among the languages")
        return self


class Share(Record):
    """The part that one cause adds to the mean divergence; the parts are measured apart and add up."""

    name: str
    """Name of the cause, for example "4-bit linears, fp32 arithmetic" or "+ int8 activations"."""
    kl_mean_nats: Number
    """Mean divergence that this cause adds to the causes before it; can be negative."""
    note: str


class Overlap(Record):
    """The overlap of evaluation with calibration text, which would flatter the bundle."""

    calibration_documents: Count
    evaluation_documents: Count
    shared_documents: Count
    shared_lines: Count
    """Distinct lines that occur in both."""
