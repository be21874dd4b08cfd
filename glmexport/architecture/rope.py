"""The numbers of a configuration that rotary frequencies are computed from, and the context that they reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from glmexport.checkpoint.config import ConfigReader

#: Tables in which transformers 5 and 4 write the numbers.
_SECTIONS = ("rope_parameters", "rope_scaling")
_ORIGINAL = "original_max_position_embeddings"
_CONTEXT = "max_position_embeddings"
#: The least that each may be; the arithmetic divides by all of them, and by the logarithm of the base.
_LEAST = {
    "rope_theta": 2.0,
    "factor": 1e-3,
    "beta_fast": 1e-3,
    "beta_slow": 1e-3,
    "low_freq_factor": 1e-3,
    "high_freq_factor": 1e-3,
    "attention_factor": 0.0,
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
    "partial_rotary_factor": 0.0,
    _ORIGINAL: 1.0,
}


@dataclass(frozen=True)
class RopeScaling:
    """A stretching of rotary frequencies: from which context, by which factor, and which context is declared."""

    kind: str
    factor: float
    original: int
    #: Whether the file says what the original context was, which the frequencies of YaRN depend on.
    told: bool
    context: int

    @property
    def reached(self) -> int:
        """The number of tokens that the stretched frequencies were made for."""
        return int(self.original * self.factor)

    @property
    def remark(self) -> str | None:
        """A remark on the context for who scaled a model; None where it is what the scaling reaches."""
        if self.context >= self.reached:
            return None
        return (
            f"{self.kind} by {self.factor:g} reaches {self.reached:,} tokens, and {_CONTEXT} leaves the context at "
            f"{self.context:,}, which is what a bundle gets. For more, set {_CONTEXT} to {self.reached}"
            + ("." if self.told else f" and, beside the factor, {_ORIGINAL} to {self.original}.")
        )


def check_rope(config: ConfigReader) -> None:
    """Check every number that rotary frequencies are computed from.

    Raises:
        CheckpointError: one is no finite number, or too small to divide by.
    """
    for table in (config, *_tables(config)):
        for key, least in _LEAST.items():
            if table.has(key):
                table.number(key, minimum=least)


def context_remark(config: ConfigReader, context: int) -> str | None:
    """Return what to know of the ``context`` of a model whose frequencies are stretched; None: there is nothing."""
    found = rope_scaling(config, context)
    return None if found is None else found.remark


def rope_scaling(config: ConfigReader, context: int) -> RopeScaling | None:
    """Return the scaling that ``config`` declares of a model that has ``context`` tokens; None: there is none.

    Raises:
        CheckpointError: as ``check_rope``.
    """
    for table in _tables(config):
        kind = next((table.text(key) for key in ("rope_type", "type") if table.has(key)), "default")
        if kind != "default" and table.has("factor"):
            # As in transformers: the one beside the table prevails, and without either the context is the original.
            holder = config if config.has(_ORIGINAL) else table
            original = int(holder.number(_ORIGINAL, default=float(context), minimum=1))
            name = "YaRN" if kind == "yarn" else f"Rotary scaling ({kind})"
            told = kind == "linear" or holder.has(_ORIGINAL)
            return RopeScaling(name, table.number("factor", minimum=_LEAST["factor"]), original, told, context)
    return None


def _tables(config: ConfigReader) -> Iterator[ConfigReader]:
    return (config.section(name) for name in _SECTIONS if config.has(name))
