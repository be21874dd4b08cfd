"""The choices of a tuning that do not belong to the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from glmexport.foundation.evidence import KvCache, Preference
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic
from glmexport.tuning.candidates import WantedValues


@dataclass(frozen=True)
class TuneOptions:
    """The choices of the caller of a tuning."""

    #: Number of cores: the threads of everything but the candidates, and the most that those take.
    cores: int
    prefer: Preference = "balanced"
    #: Share of the target's gate on the mean divergence that a candidate may use up.
    allowance: float = 0.25
    #: Recipes to try in place of the shipped ones of the start's bits.
    recipes: tuple[str, ...] = ()
    #: Caches to try in place of floats and 8 bits.
    kv_caches: tuple[KvCache, ...] = ()
    threads: tuple[int, ...] = ()
    session: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    provider: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: Seconds of the rounds of a finalist.
    seconds: float = 25
    #: Number of tokens a language for the divergence.
    positions: int = 128
    #: Number of tokens of the long prompt.
    prompt_tokens: int = 512
    #: Number of tokens that follow either prompt.
    generated_tokens: int = 16
    #: Whether the weights whose divergence is measured are made by GPTQ, a whole build's work for each recipe.
    calibrated: bool = False
    #: The way in which products of fp32 matrices are computed.
    arithmetic: OriginalArithmetic = UNCHECKED
    force: bool = False

    @property
    def wanted(self) -> WantedValues:
        """The values to try in place of the usual ones."""
        return WantedValues(self.kv_caches, self.threads, self.session, self.provider)
