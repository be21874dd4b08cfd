"""Caches of a fixed capacity, which new positions are written into: where they go, and what they see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from glmexport.lowering.attention import computing_node, input_ids, shared_position_ids, shared_values
from glmexport.lowering.rewrite import MICROSOFT, Rewrite

_PLACES, _CAUSAL = "cache_places", "causal_bias"


@dataclass(frozen=True)
class Positions:
    """The positions of the new tokens, as values that all layers of a graph share."""

    #: The position of each new token, [B, S] int64.
    positions: ir.Value
    #: The places in the cache, [B, S, 2] int64: sequence and position, as ScatterND takes them.
    places: ir.Value
    #: The mask [B, S, C] fp32: 0 where a cached position is not behind the token's own, otherwise minus infinity.
    causal: ir.Value


def shared_positions(model: ir.Model, node: ir.Node) -> Positions:
    """Return the positions of the graph's input; ``node`` is one that reads a cache."""
    found = shared_values(model)
    positions = shared_position_ids(model)
    if _CAUSAL in found:
        return Positions(positions, found[_PLACES], found[_CAUSAL])
    ids, before_all = input_ids(model), computing_node(positions)
    cache = node.inputs[3]
    rewrite = Rewrite(model, before_all)
    one, zero = rewrite.constant("one", np.array(1, np.int64)), rewrite.constant("zero", np.array(0, np.int64))
    (shape,) = rewrite.op("Shape", [ids])
    (batch,) = rewrite.op("Gather", [shape, zero], {"axis": 0})
    (rows,) = rewrite.op("Range", [zero, batch, one])
    (rows,) = rewrite.op("Unsqueeze", [rows, rewrite.integers(1)])
    (rows,) = rewrite.op("Expand", [rows, shape])
    parts = [rewrite.op("Unsqueeze", [part, rewrite.integers(2)])[0] for part in (rows, positions)]
    (places,) = rewrite.op("Concat", parts, {"axis": -1})
    (sizes,) = rewrite.op("Shape", [cache])
    (capacity,) = rewrite.op("Gather", [sizes, one], {"axis": 0})
    (cached,) = rewrite.op("Range", [zero, capacity, one])
    (seen,) = rewrite.op("LessOrEqual", [cached, parts[1]])
    choices = [rewrite.constant(name, np.array(value, np.float32)) for name, value in SEEN.items()]
    (causal,) = rewrite.op("Where", [seen, *choices])
    places.name, causal.name = _PLACES, _CAUSAL
    model.graph.insert_after(before_all, rewrite.nodes)
    return Positions(positions, places, causal)


#: Constants that are added to the score of a position, by their names.
SEEN = {"seen": 0.0, "unseen": -np.inf}


def write_to_cache(rewrite: Rewrite, cache: ir.Value | None, positions: Positions, new: ir.Value) -> ir.Value:
    """Return ``cache`` [B, C, width] with ``new`` [B, S, width] in its places; in place where both are one buffer."""
    return rewrite.op("ScatterND", [cache, positions.places, new])[0]


def rotate(
    rewrite: Rewrite, x: ir.Value | None, positions: Positions, tables: list[ir.Value], interleaved: int
) -> ir.Value:
    """Return ``x`` [B, S, size] or [B, heads, S, size], rotated as its positions tell."""
    return rewrite.op(
        "RotaryEmbedding", [x, positions.positions, *tables], {"interleaved": interleaved}, domain=MICROSOFT
    )[0]


def scores_of(rewrite: Rewrite, query: ir.Value, cache: ir.Value, width: int) -> tuple[ir.Value, ir.Value]:
    """Return the products [B, heads, S, C] of ``query`` [B, heads, S, width] with every row of ``cache`` [B, C, width].

    All heads are rows of one matrix product. Also the shape [B, heads, S, -1], to take such rows apart again.
    """
    (shape,) = rewrite.op("Shape", [query], {"end": 3})
    (apart,) = rewrite.op("Concat", [shape, rewrite.integers(-1)], {"axis": 0})
    (flat,) = rewrite.op("Reshape", [query, rewrite.integers(0, -1, width)])
    (turned,) = rewrite.op("Transpose", [cache], {"perm": [0, 2, 1]})
    (scores,) = rewrite.op("MatMul", [flat, turned])
    return rewrite.op("Reshape", [scores, apart])[0], apart
