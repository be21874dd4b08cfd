"""The choice of the loop that decodes with a graph, and the size of its caches."""

from __future__ import annotations

from glmexport.architecture.description import Architecture
from glmexport.foundation.host import CPU_PROVIDER
from glmexport.foundation.target import GraphLimits, Target


def own_loop(architecture: Architecture, limits: GraphLimits) -> bool:
    """Return whether a loop of ours decodes with the graph over latents, and not onnxruntime-genai over heads."""
    return (
        limits.latent_cache and not limits.static_shapes and architecture.latent_values_per_token is not None
    )


def answers_together(architecture: Architecture, target: Target) -> bool:
    """Return whether the loop over a bundle for ``target`` computes steps of several answers in one run."""
    limits = target.graph
    return target.provider.name == CPU_PROVIDER and not limits.static_shapes and not own_loop(architecture, limits)


def cache_bytes_per_token(architecture: Architecture, limits: GraphLimits) -> int:
    """Return the bytes that a token of context adds to the caches of all layers; scales do not depend on tokens."""
    if own_loop(architecture, limits):
        assert architecture.latent_values_per_token is not None
        return 4 * architecture.latent_values_per_token
    bits = {"activations": 32 if limits.activations == "float32" else 16, "int8": 8, "int4": 4}[limits.kv_cache]
    return architecture.kv_values_per_token * bits // 8
