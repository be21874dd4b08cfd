"""The kinds of arithmetic that one quantized model is run in, and the variants of its graph that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from glmexport.foundation.evidence import FLOATS, KvCache
from glmexport.foundation.target import Target
from glmexport.tuning.candidates import EXACT_LEVEL


@dataclass(frozen=True)
class Arithmetic:
    """An accuracy level of the products, and the type of the caches."""

    level: int
    kv_cache: KvCache = FLOATS

    @property
    def name(self) -> str:
        """Its name in the work directory."""
        return f"level-{self.level}" if self.kv_cache == FLOATS else f"level-{self.level}-{self.kv_cache}"

    def in_target(self, target: Target) -> Target:
        """Return ``target`` with this arithmetic."""
        return target.model_copy(
            update={
                "weights": target.weights.model_copy(update={"accuracy_level": self.level}),
                "graph": target.graph.model_copy(update={"kv_cache": self.kv_cache}),
            }
        )


@dataclass(frozen=True)
class Variants:
    """A graph lowered in several ways."""

    #: The target that each variant is lowered for, by the variant's name.
    targets: Mapping[str, Target]
    #: The variant in fp32 arithmetic, with which the others are compared.
    exact: str
    #: The variant that caches floats, and is otherwise the same, for each one with a quantized cache.
    floats: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def for_arithmetics(cls, target: Target, arithmetics: Sequence[Arithmetic]) -> Variants:
        """Return a variant for each of ``arithmetics``, with the exact one among them."""
        return cls(
            {each.name: each.in_target(target) for each in arithmetics},
            Arithmetic(EXACT_LEVEL).name,
            {each.name: Arithmetic(each.level).name for each in arithmetics if each.kv_cache != FLOATS},
        )
