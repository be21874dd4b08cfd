"""The evidence that a tuned target rests on: every candidate with its settings, speed, divergence and outcome."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from glmexport.foundation.definition import Definition
from glmexport.foundation.session_settings import check_session_entries

#: The type that keys and values are cached in: the activations' type, or integers with calibrated scales.
KvCache = Literal["activations", "int8", "int4"]
FLOATS: KvCache = "activations"
Preference = Literal["decode", "prefill", "balanced"]
#: ``start``: what the target says; ``chosen``: what the tuned target says; ``front``: no other candidate is both faster
#: and less divergent; ``beaten``: another one is; ``illegal``: it diverges too far, or does not run here.
Outcome = Literal["start", "chosen", "front", "beaten", "illegal"]


class _Measured(Definition):
    # A candidate whose kernels are broken has a divergence that is no number, which JSON does not know.
    model_config = ConfigDict(ser_json_inf_nan="strings")


class CandidateSettings(Definition):
    """The settings that a candidate changes. The rest of the target stays as it is."""

    #: Name, or file, of the recipe that gives the formats.
    recipe: str
    accuracy_level: Literal[0, 1, 2, 3, 4]
    packed_qkv: bool
    kv_cache: KvCache = FLOATS
    #: Threads within an operator.
    threads: int = Field(ge=1)
    #: Entries of ONNX Runtime's session configuration.
    session: dict[str, str] = Field(default_factory=dict)
    #: Options of the execution provider.
    provider: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _may_be_set(self) -> Self:
        check_session_entries(self.session)
        return self


class Gain(_Measured):
    """Speed of a candidate over that of the start: the ratio of the medians of paired rounds, and its bounds.

    Each bound is beyond the true ratio in 5 % of cases; without bounds the rounds were too few.
    """

    ratio: float
    lower: float | None = None
    upper: float | None = None

    @property
    def sure(self) -> bool:
        """Whether even the lower bound is a gain."""
        return self.lower is not None and self.lower > 1


class Gains(_Measured):
    """The gain of a candidate in each thing that was timed."""

    #: Decoding of one token behind a short prompt, and behind a long one.
    decode: Gain
    decode_long: Gain
    #: Prefill of the long prompt.
    prefill: Gain
    #: The quantity that was asked for: the geometric mean of what ``prefer`` names.
    preferred: Gain
    rounds: int


class Deviation(_Measured):
    """A mean KL divergence in nats per token, and the language in which it is largest."""

    mean: float
    #: The upper bound: the true mean is above it in 5 % of samples of documents. Absent where there is one document.
    upper: float | None = None
    worst: float
    language: str


class Divergences(_Measured):
    """The distance by which a candidate's numbers move the next-token distribution, over the whole model."""

    #: Divergence from the original.
    original: Deviation
    #: Divergence from the candidate's own weights in fp32 arithmetic: what the runtime's arithmetic alone does.
    arithmetic: Deviation
    positions: int


class TriedCandidate(_Measured):
    """One candidate that was tried, with its settings and results."""

    settings: CandidateSettings
    outcome: Outcome
    reason: str
    #: Absent where the candidate was not timed.
    gains: Gains | None = None
    divergence: Divergences | None = None


class Evidence(_Measured):
    """The account of how a tuned target came about."""

    verdict: str
    #: Gains of the chosen settings, in rounds of their own that took no part in choosing. Absent where the start stays.
    confirmed: Gains | None = None
    start: str
    checkpoint: str
    checkpoint_digest: str
    prefer: Preference
    #: Nats per token that arithmetic, and a format beside the start's, may add in any language.
    allowance_nats: float
    #: The way in which the weights were quantized for the divergence. GPTQ leaves about a fifth of what rounding to
    #: nearest leaves.
    weights: Literal["round-to-nearest", "gptq"]
    text_digest: str
    #: The decoder blocks that were timed.
    timed: str
    prompt_tokens: tuple[int, int]
    generated_tokens: int
    processor: str
    cores: int
    system: str
    libraries: dict[str, str]
    date: str
    candidates: tuple[TriedCandidate, ...]
