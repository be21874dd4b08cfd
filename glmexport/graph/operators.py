"""The operators that a graph is made of before it is lowered, and the rules that such a graph keeps.

Domain ``glmexport``. Shapes: B sequences, S new positions, P cached positions, T = P + S, D hidden size.

    Embedding(input_ids [B, S] int64) -> [B, S, D]                       weight
    RmsNorm(x [..., D]) -> [..., D]                                      weight, epsilon
    Linear(x [..., K]) -> [..., N]                                       weights, biases, in_features, out_features
        rows of several checkpoint matrices, stacked; ``biases`` is empty or names one vector a matrix; a router's has
        ``float32``, and is computed so on every target
    Attention(qkv..., past_key, past_value, attention_mask [B, T] int64) -> out [B, S, heads * head_dim],
        present_key [B, kv_heads, T, head_dim], present_value            heads, kv_heads, head_dim, scale,
                                                                         rotary_dimensions, interleaved
        qkv is one packed value, or query, key and value; in a graph of fixed shapes, caches [1, C, kv_heads * head_dim]
        and position_ids [1, S] int64 in place of the mask
    SplitLatent(x [B, S, rank + rope]) -> latent [B, S, rank], rotary key [B, S, rope]      rank, rope
    ExpandedAttention(query [B, S, heads * (nope + rope)], latent, rotary key, past_key, past_value, attention_mask)
        -> out [B, S, heads * value], present_key [B, heads, T, size], present_value
        latent attention with every head's keys and values cached; ``weight`` [heads * (nope + value), rank] makes
        them of the latent             weight, heads, nope, rope, value, rank, size, scale, interleaved
    LatentAttention(query, latent, rotary key, past, attention_mask, selection?)
        -> out [B, S, heads * value], present [B, C, rank + rope]
        the same with latent and rotary key cached         as ExpandedAttention, without size
    IndexSelection(query [B, S, heads * head_dim], key [B, S, head_dim], head weights [B, S, heads], past,
        attention_mask) -> selection [B, S, C] float, present [B, C, head_dim]
        0 where a cached position is among the ``top_k`` with the highest score, otherwise minus infinity
                                                           heads, head_dim, rope, top_k, key_norm, epsilon
    GatedActivation(x [..., 2 I]) -> silu(first half) * second half      intermediate_size
    HeadNorm(x [B, S, heads * head_dim]) -> likewise                     weight, epsilon, head_dim
        RMSNorm of each head
    Route(logits [B, S, E]) -> experts [B * S, C] int64, weights [B * S, C]
                                                                         bias, experts, chosen, groups, kept_groups,
                                                                         normalized, scale
    RoutedExperts(x [B, S, D], experts, weights) -> [B, S, D]            gate_up, down, hidden_size, intermediate_size
        the weighted sum of what the chosen experts give; ``gate_up`` and ``down`` name a matrix an expert
    LastPosition(x [B, S, D], attention_mask) -> [B, 1, D]               the last position that is not padding
    RecentPositions(x [B, S, D], attention_mask) -> [B, R, D]            most
        all positions of a step of at most ``most``, R = S; of a longer one the last that is not padding, R = 1
    AskedPosition(x [1, S, D], asked_position [1] int64) -> [1, 1, D]    the one at that index of the new ones

Keys and values are cached in the activations' type, or as codes: int8, or two 4-bit ones in a byte.

A cache of T positions grows with every call. One of C positions, the capacity, is written into: a token's place is its
position, and what is behind the sequence does not count.

Residual additions are the standard ``Add``; what is read side by side is joined by the standard ``Concat``. Every node
carries the name of the block it belongs to, which decides the file that its weights are stored in.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

DOMAIN = "glmexport"
BLOCK = "glmexport.block"

OPERATORS = frozenset(
    {
        "Embedding",
        "RmsNorm",
        "HeadNorm",
        "Linear",
        "Attention",
        "SplitLatent",
        "ExpandedAttention",
        "LatentAttention",
        "IndexSelection",
        "GatedActivation",
        "Route",
        "RoutedExperts",
        "LastPosition",
        "RecentPositions",
        "AskedPosition",
    }
)


def nodes_of(model: ir.Model, operator: str) -> Iterator[ir.Node]:
    """Yield the nodes of one of our operators, in order, also inside of others.

    The graph may be changed while iterating.
    """
    return iter([node for node in model.graph.all_nodes() if node.domain == DOMAIN and node.op_type == operator])


def violations(model: ir.Model) -> list[str]:
    """Return what breaks the rules above: foreign operators, nodes without a block, weights before their time."""
    found = []
    for node in model.graph:
        if node.domain == DOMAIN:
            if node.op_type not in OPERATORS:
                found.append(f"{node.name}: {node.op_type} is not an operator of ours")
        elif (node.domain, node.op_type) not in {("", "Add"), ("", "Concat")}:
            found.append(f"{node.name}: {node.domain}::{node.op_type} before lowering")
        if BLOCK not in node.metadata_props:
            found.append(f"{node.name}: belongs to no block")
    if model.graph.initializers:
        found.append("weights appear before lowering")
    return found


def text(node: ir.Node, name: str) -> str:
    """Return a string attribute."""
    return str(node.attributes[name].as_string())


def texts(node: ir.Node, name: str) -> list[str]:
    """Return a list of strings; empty where the attribute is absent (ONNX cannot type an empty list)."""
    return list(node.attributes[name].as_strings()) if name in node.attributes else []


def integer(node: ir.Node, name: str) -> int:
    """Return an integer attribute."""
    return int(node.attributes[name].as_int())


def number(node: ir.Node, name: str) -> float:
    """Return a float attribute."""
    return float(node.attributes[name].as_float())
