"""The part of the graph that is latent attention: one cache of latents a layer, or keys and values of every head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from glmexport.architecture.latent import Indexer, LatentAttention
from glmexport.bundle.names import INDEX, LATENT, PAST, PRESENT

if TYPE_CHECKING:
    from glmexport.graph.builder import GraphBuilder


class LatentLayers:
    """The latent attention of all layers of a graph; a selection goes from one to the next.

    ``latent_cache``: whether latents are cached; selections need it, since their keys are one more cache.
    """

    def __init__(self, builder: GraphBuilder, latent_cache: bool) -> None:
        self.builder = builder
        self.latent_cache = latent_cache
        self.selection: ir.Value | None = None

    def attention(self, layer: int, attention: LatentAttention, normed: ir.Value) -> ir.Value:
        """Return what the attention of a layer adds to the stream, [B, S, D]."""
        build = self.builder
        query_latent = normed
        if attention.query_down is not None:
            query_latent = build.linears(normed, [attention.query_down])
            assert attention.query_norm is not None
            query_latent = build.norm(attention.query_norm, query_latent)
        query = build.linears(query_latent, [attention.query])
        latent, rotary_key = ir.Value(), ir.Value()
        written = build.linears(normed, [attention.down])
        build.node("SplitLatent", [written], [latent, rotary_key], rank=attention.rank, rope=attention.rope)
        read = [query, build.norm(attention.latent_norm, latent), rotary_key]
        attended = ir.Value()
        attributes: dict[str, Any] = {
            "weight": attention.key_value.weight,
            "heads": attention.heads,
            "nope": attention.nope,
            "rope": attention.rope,
            "value": attention.value_dim,
            "rank": attention.rank,
            "scale": attention.scale,
            "interleaved": int(attention.rotary.interleaved),
        }
        if not self.latent_cache:
            size = attention.padded_head_dim
            past, present = build.head_caches(layer, attention.heads, size)
            inputs = [*read, *past, build.mask]
            build.node("ExpandedAttention", inputs, [attended, *present], size=size, **attributes)
            return build.attention_output(attention.output, attended)
        if attention.indexer:
            self.selection = self._select(layer, attention.indexer, normed, query_latent)
        selection = self.selection if attention.indexer or attention.shared_selection else None
        width = attention.rank + attention.rope
        before = build.cache(PAST, layer, LATENT, ["capacity", width])
        after = build.cache(PRESENT, layer, LATENT, ["capacity", width])
        inputs = [*read, before, build.mask, *([selection] if selection else [])]
        build.node("LatentAttention", inputs, [attended, after], **attributes)
        return build.attention_output(attention.output, attended)

    def _select(self, layer: int, indexer: Indexer, normed: ir.Value, query_latent: ir.Value) -> ir.Value:
        build = self.builder
        query = build.linears(query_latent, [indexer.query])
        key, head_weights = (build.linears(normed, [part]) for part in (indexer.key, indexer.head_weights))
        before = build.cache(PAST, layer, INDEX, ["capacity", indexer.head_dim])
        after = build.cache(PRESENT, layer, INDEX, ["capacity", indexer.head_dim])
        selection = ir.Value()
        build.node(
            "IndexSelection",
            [query, key, head_weights, before, build.mask],
            [selection, after],
            heads=indexer.heads,
            head_dim=indexer.head_dim,
            rope=indexer.rotary.dimensions,
            top_k=indexer.top_k,
            key_norm=indexer.key_norm,
            epsilon=indexer.key_epsilon,
        )
        return selection
