"""Explanations of what each lowering does for a target, and why, from the same capabilities that the passes ask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from glmexport.foundation.provenance import Claim
from glmexport.foundation.target import GraphLimits, Target
from glmexport.lowering.embedding import FUSED as FUSED_ROWS
from glmexport.lowering.norm import FUSED

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Lowering:
    """One decision: what the graph gets, the key that decides it, and the target's reason."""

    name: str
    does: str
    key: str
    #: The target's reason; None where it gives none.
    claim: Claim | None


def lowerings(target: Target) -> list[Lowering]:
    """Return every decision that is taken for ``target``, in the order of the graph."""
    claims = target.provenance.claims
    return [Lowering(name, does, key, claims.get(key)) for name, does, key in _decisions(target)]


def _decisions(target: Target) -> Iterator[tuple[str, str, str]]:
    graph, weights, memory = target.graph, target.weights, target.memory
    yield "opset", f"opset {graph.opset}, IR version {graph.ir_version}", "graph.opset"
    yield "activations", f"{graph.activations}; token ids int64, logits and routers float32", "graph.activations"
    if weights.form == "QDQ":
        codes = "signed, without zero points" if weights.symmetric_only else "unsigned, with zero points"
        yield "linears", f"DequantizeLinear over blocks and MatMul; codes {codes}", "weights.form"
    else:
        yield "linears", "MatMulNBits over packed codes, scales and zero points", "weights.form"
        told = "int8 by blocks" if weights.accuracy_level == 4 else f"accuracy_level {weights.accuracy_level}"
        yield "arithmetic of linears", told, "weights.accuracy_level"
    fused = "GatherBlockQuantized over packed codes"
    rows = fused if target.can(FUSED_ROWS) else "rows of codes by Gather, made numbers by arithmetic"
    yield "embedding", rows, "graph.contrib_operators"
    bits, sizes = (" or ".join(map(str, values)) for values in (weights.bits, weights.group_sizes))
    yield "weight formats", f"{bits} bits, by default as in {weights.default_recipe}", "weights.bits"
    yield "group sizes", sizes, "weights.group_sizes"
    if weights.symmetric_only:
        yield "zero points", "none: asymmetric formats are refused", "weights.symmetric_only"
    packed = "one product of query, key and value" if graph.packed_qkv else "a product each for query, key and value"
    yield "projections", packed, "graph.packed_qkv"
    yield "rotary embedding", _rotation(graph), "graph.rope_in_attention"
    yield "cache", _cache(target), "graph.kv_cache"
    if target.can(FUSED):
        norms = "fused with the addition before it"
    else:
        norms = "SimplifiedLayerNormalization" if graph.norm == "operator" else "standard operators in float32"
    yield "norms", norms, "graph.norm"
    latent = "one latent a token" if graph.latent_cache else "keys and values of every head"
    yield "cache of latent attention", "refused" if graph.static_shapes else latent, "graph.latent_cache"
    branches = graph.expert_branches and not graph.static_shapes
    experts = "one branch an expert, routers in float32" if branches else "refused"
    yield "mixtures of experts", experts, "graph.expert_branches"
    if graph.static_shapes:
        shapes = "all fixed: a graph for a chunk of a prompt and one for a single token, over the same weights"
        yield "shapes", shapes, "graph.static_shapes"
        yield "chunk", f"{graph.chunk} positions of a prompt", "graph.chunk"
        yield "context", f"{graph.capacity} positions, or the model's if that is shorter", "graph.capacity"
    else:
        yield "shapes", "any length of prompt and cache", "graph.static_shapes"
    for key, what in (("tensor", "one tensor"), ("file", "one file"), ("weight", "all weights")):
        limit = getattr(memory, f"max_{key}_bytes")
        if limit is not None:
            yield f"size of {what}", f"at most {limit.human_readable()}", f"memory.max_{key}_bytes"


def _rotation(graph: GraphLimits) -> str:
    if graph.static_shapes:
        return "standard operators, as the whole of attention; softmax in float32"
    return "inside GroupQueryAttention" if graph.rope_in_attention else "by RotaryEmbedding before attention"


def _cache(target: Target) -> str:
    graph = target.graph
    if graph.kv_cache == "activations":
        return f"keys and values in {graph.activations}"
    each = "channel of a head" if graph.kv_scales == "channel" else "layer"
    less = _BYTES[graph.activations] * 8 // (8 if graph.kv_cache == "int8" else 4)
    return f"keys and values in {graph.kv_cache}, a calibrated scale for every {each}: {less} times less memory"
