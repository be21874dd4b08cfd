"""The heads that ONNX Runtime's attention operators take: decided when a graph is planned, before any computation."""

from __future__ import annotations

from glmexport.architecture.description import Architecture, DecoderLayer
from glmexport.architecture.latent import LatentAttention
from glmexport.foundation.target import GraphLimits, Target
from glmexport.graph.caches import own_loop

ROTARY = "com.microsoft::RotaryEmbedding"
#: GroupQueryAttention takes heads of a multiple of this size, and of twice the size where it rotates them, which it
#: does as far as twice the width of its tables goes, in as large steps.
_STEP, _ROTATED_STEP = 8, 16


def rotates_inside(limits: GraphLimits, head_dim: int, rotary_dimensions: int) -> bool:
    """Return whether GroupQueryAttention rotates queries and keys; else RotaryEmbedding does, any even width."""
    fits = head_dim % _ROTATED_STEP == 0 and rotary_dimensions % _ROTATED_STEP == 0
    return limits.rope_in_attention and fits


def unfit_heads(architecture: Architecture, target: Target) -> str | None:
    """Return why the operators of ``target`` do not take the heads of ``architecture``, a clause; None if they do."""
    limits = target.graph
    if limits.static_shapes:
        # Standard arithmetic, of any size.
        return None
    draft = architecture.token_prediction
    for layer in (*architecture.layers, *([draft.layer] if draft else [])):
        size = _size(layer)
        if own_loop(architecture, limits):
            if not target.can(ROTARY):
                return f"rotates latents by {ROTARY}, which it does not list"
            continue
        if size % _STEP:
            return f"has heads of {size} numbers, and GroupQueryAttention takes multiples of {_STEP}"
        if not rotates_inside(limits, size, layer.attention.rotary.dimensions) and not target.can(ROTARY):
            return f"rotates {layer.attention.rotary.dimensions} of {size} numbers by {ROTARY}, which it does not list"
    return None


def _size(layer: DecoderLayer) -> int:
    """Return the size of a head as it is cached."""
    attention = layer.attention
    return attention.padded_head_dim if isinstance(attention, LatentAttention) else attention.head_dim
