"""Attention with a query, key and value projection, of which several query heads share a key and value head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from glmexport.architecture.description import Linear, Norm, Rotary, Writer


@dataclass(frozen=True)
class GroupedQueryAttention:
    """A causal softmax attention with ``heads`` query heads sharing ``kv_heads`` key and value heads."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    #: Norm of every query head before it is rotated, as ``key_norm`` is of key heads; both or none.
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    #: Whether another layer's selection of what is attended to is used.
    shared_selection: ClassVar[bool] = False

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms inside of the attention that exist, in order."""
        return tuple(norm for norm in (self.query_norm, self.key_norm) if norm is not None)

    @property
    def scale(self) -> float:
        """The factor of the scores before the softmax."""
        return 1 / math.sqrt(self.head_dim)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears in the order in which data passes them."""
        return (self.query, self.key, self.value, self.output)

    @property
    def head_values(self) -> int:
        """The numbers that a cache of keys and values holds for a token."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def latent_values(self) -> None:
        """None, as no latent is cached."""
        return None

    @property
    def attended(self) -> None:
        """None, as a token attends to all that come before it."""
        return None

    @property
    def kept_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of further tensors, which stay in full precision."""
        return {}

    def writers(self, input_norm: Norm) -> Iterator[tuple[str, Writer]]:
        """Yield each tap, and the writer of its input."""
        yield self.value.tap, Writer(input_norm, range(self.value.in_features))
        shared, size = self.heads // self.kv_heads, self.head_dim
        values = [head // shared * size + row for head in range(self.heads) for row in range(size)]
        yield self.output.tap, Writer(self.value, values)
