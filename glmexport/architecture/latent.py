"""Latent attention (MLA, arXiv 2405.04434) and the indexer of DeepSeek sparse attention (arXiv 2512.02556), described.

Keys and values of all heads are linear in one latent vector a token, so that a cache holds the latent and one rotary
key for all heads in place of every head's key and value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from glmexport.architecture.description import Linear, Norm, Rotary, Writer


@dataclass(frozen=True)
class Indexer:
    """A choice of the ``top_k`` cached tokens that a token attends to.

    score(t, s) = sum over heads h of w_h(t) relu(q_h(t) . k(s) / sqrt(head_dim)) / sqrt(heads), where q reads the
    query latent, k and w the layer's normed input, k is LayerNormed, and the first dimensions of q and k are rotated.
    """

    heads: int
    head_dim: int
    top_k: int
    rotary: Rotary
    query: Linear
    key: Linear
    #: Key prefix of the LayerNorm's weight and bias, both [head_dim].
    key_norm: str
    key_epsilon: float
    head_weights: Linear

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint key and shape of its tensors, all of which stay in full precision."""
        matrices = (self.query, self.key, self.head_weights)
        return {linear.weight: (linear.out_features, linear.in_features) for linear in matrices} | {
            f"{self.key_norm}.{kind}": (self.head_dim,) for kind in ("weight", "bias")
        }


@dataclass(frozen=True)
class LatentAttention:
    """A causal softmax attention whose keys and values are linear in a cached latent.

    A query head is ``nope`` dimensions without a position, then ``rope`` rotated ones. A row of ``key_value`` for head
    h is its ``nope`` key dimensions, then its ``value_dim`` value dimensions; the rotary key is shared by all heads.
    ``down`` writes the latent [rank], which ``latent_norm`` norms, and the rotary key [rope].
    """

    heads: int
    nope: int
    value_dim: int
    rank: int
    #: Rotation of the last ``rope`` dimensions of a query head, and of the shared key.
    rotary: Rotary
    #: Factor of the scores before the softmax.
    scale: float
    #: Low-rank first half of the query projection and its norm; None where the query is read from the input itself.
    query_down: Linear | None
    query_norm: Norm | None
    query: Linear
    down: Linear
    latent_norm: Norm
    key_value: Linear
    output: Linear
    #: The indexer that selects what is attended to, for this layer and the ones behind it that share it. None: the
    #: layer attends to everything, or to the selection of the layer before (``shared_selection``).
    indexer: Indexer | None = None
    shared_selection: bool = False

    @property
    def rope(self) -> int:
        """The dimensions of the rotary key."""
        return self.rotary.dimensions

    @property
    def head_dim(self) -> int:
        """The dimensions of a query or key head."""
        return self.nope + self.rope

    @property
    def padded_head_dim(self) -> int:
        """The least size that holds a key and a value, and a multiple of 16, which GroupQueryAttention insists on."""
        return math.ceil(max(self.head_dim, self.value_dim) / 16) * 16

    @property
    def latent_values(self) -> int:
        """The numbers that a cache of latents holds for a token: latent, rotary key, and the indexer's key."""
        return self.rank + self.rope + (self.indexer.head_dim if self.indexer else 0)

    @property
    def head_values(self) -> int:
        """The numbers that a cache of keys and values holds for a token."""
        return 2 * self.heads * self.padded_head_dim

    @property
    def attended(self) -> int | None:
        """The most tokens that this layer's indexer chooses; None: it has none."""
        return self.indexer.top_k if self.indexer else None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears that are quantized, in the order in which data passes them."""
        if self.query_down is None:
            return (self.query, self.down, self.key_value, self.output)
        # Those that read the layer's input, then those that read a latent.
        return (self.query_down, self.down, self.query, self.key_value, self.output)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms inside of the attention."""
        return tuple(norm for norm in (self.query_norm, self.latent_norm) if norm is not None)

    @property
    def kept_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of further tensors, which stay in full precision."""
        return self.indexer.shapes if self.indexer else {}

    def writers(self, input_norm: Norm) -> Iterator[tuple[str, Writer]]:
        """Yield each tap, and the writer of its input."""
        indexer = self.indexer
        yield (
            self.down.tap,
            Writer(input_norm, range(self.down.in_features), (indexer.key, indexer.head_weights) if indexer else ()),
        )
        if self.query_norm is not None:
            also = (indexer.query,) if indexer else ()
            yield self.query.tap, Writer(self.query_norm, range(self.query.in_features), also)
        yield self.key_value.tap, Writer(self.latent_norm, range(self.rank))
        height = self.nope + self.value_dim
        values = [head * height + self.nope + row for head in range(self.heads) for row in range(self.value_dim)]
        yield self.output.tap, Writer(self.key_value, values)
