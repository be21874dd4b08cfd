"""Which loop decodes with a graph, and what the caches take that it works on."""

from __future__ import annotations

from glmexport.architecture.description import Architecture
from glmexport.foundation.target import GraphLimits


def own_loop(architecture: Architecture, limits: GraphLimits) -> bool:
    """Whether a loop of ours decodes with the graph over latents, and not onnxruntime-genai over heads."""
    return (
        limits.latent_cache and not limits.static_shapes and architecture.latent_values_per_token is not None
    )


def cache_bytes_per_token(architecture: Architecture, limits: GraphLimits) -> int:
    """What a token of context adds to the caches of all layers, bytes; scales of a quantized cache are per layer."""
    if own_loop(architecture, limits):
        assert architecture.latent_values_per_token is not None
        return 4 * architecture.latent_values_per_token
    bits = {"activations": 32 if limits.activations == "float32" else 16, "int8": 8, "int4": 4}[limits.kv_cache]
    return architecture.kv_values_per_token * bits // 8
