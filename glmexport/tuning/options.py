"""The choices of a tuning that are not the target's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from glmexport.foundation.evidence import KvCache, Preference
from glmexport.tuning.candidates import WantedValues


@dataclass(frozen=True)
class TuneOptions:
    """What a tuning is free to choose."""

    #: Cores of the machine: for everything but the candidates, and the most threads that those take.
    cores: int
    prefer: Preference = "balanced"
    #: Share of the target's gate on the mean divergence that a candidate may use up.
    allowance: float = 0.25
    #: To try in place of the shipped recipes of the start's bits.
    recipes: tuple[str, ...] = ()
    #: To try in place of floats and 8 bits.
    kv_caches: tuple[KvCache, ...] = ()
    threads: tuple[int, ...] = ()
    session: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    provider: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: Seconds of the rounds of a finalist.
    seconds: float = 25
    #: Tokens a language for the divergence.
    positions: int = 128
    #: Tokens of the long prompt, and behind either.
    prompt_tokens: int = 512
    generated_tokens: int = 16
    #: Measure the divergence of weights that GPTQ made, a whole build's work for each recipe.
    calibrated: bool = False
    force: bool = False

    @property
    def wanted(self) -> WantedValues:
        """Return the values to try in place of the usual ones."""
        return WantedValues(self.kv_caches, self.threads, self.session, self.provider)
