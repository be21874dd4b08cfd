"""Attention with a query, key and value projection, of which several query heads share a key and value head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from glmexport.architecture.description import Linear, Norm, Rotary, Writer


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Causal softmax attention with ``heads`` query heads sharing ``kv_heads`` key and value heads."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    #: Of every query head and every key head before they are rotated; both or none.
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    #: Of another layer, of what is attended to.
    shared_selection: ClassVar[bool] = False

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Inside of the attention: those that exist, in order."""
        return tuple(norm for norm in (self.query_norm, self.key_norm) if norm is not None)

    @property
    def scale(self) -> float:
        """Factor of the scores before the softmax."""
        return 1 / math.sqrt(self.head_dim)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order in which data passes them."""
        return (self.query, self.key, self.value, self.output)

    @property
    def head_values(self) -> int:
        """Numbers that a cache of keys and values holds for a token."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def latent_values(self) -> None:
        """No latent is cached."""
        return None

    @property
    def attended(self) -> None:
        """A token attends to all that come before it."""
        return None

    @property
    def kept_shapes(self) -> dict[str, tuple[int, ...]]:
        """Further tensors, which stay in full precision."""
        return {}

    def writers(self, input_norm: Norm) -> Iterator[tuple[str, Writer]]:
        """Tap, and what computes it channel by channel."""
        yield self.value.tap, Writer(input_norm, range(self.value.in_features))
        shared, size = self.heads // self.kv_heads, self.head_dim
        values = [head // shared * size + row for head in range(self.heads) for row in range(size)]
        yield self.output.tap, Writer(self.value, values)
