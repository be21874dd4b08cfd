"""Attention as GroupQueryAttention: the rotary embedding inside it or before it, the cache in floats or in codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from glmexport.bundle.names import ATTENTION_MASK, INPUT_IDS
from glmexport.foundation.target import GraphLimits, Target
from glmexport.graph.heads import rotates_inside
from glmexport.graph.operators import integer, nodes_of, number
from glmexport.lowering.rewrite import FLOAT32, MICROSOFT, SHARED_BLOCK, Rewrite, weight

SEQUENCE_LENGTHS, TOTAL_LENGTH, POSITIONS = "sequence_lengths", "total_length", "positions"
#: Names of the initializers that hold the scales of a cache, by the block and by "key" or "value".
CACHE_SCALE = "{block}.{kind}_cache.scale"
CACHE_BITS = {"int8": 8, "int4": 4}


class LowerAttentionPass(ir.passes.InPlacePass):
    """Attention becomes GroupQueryAttention.

    1. The operator counts positions instead of masking them: ``sequence_lengths`` is the number of ones in each
       row of the attention mask minus one, ``total_length`` the width of the mask. Padding goes to the right.
    2. The width of the cos and sin caches tells it how much of a head is rotated. Where the target wants the rotation
       outside, or the operator does not take such a width, RotaryEmbedding does it at the positions that follow from
       the same lengths.
    3. The scale is written out: the operator's default is right for one head size only.
    4. Of a quantized cache it reads scales [kv_heads, 1, head_dim] or [1] fp32: ones here, which calibration replaces.
    """

    def __init__(self, target: Target, rotary_tables: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.limits = target.graph
        self.rotary_tables = rotary_tables

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every Attention."""
        nodes = list(nodes_of(model, "Attention"))
        if nodes:
            lengths = shared_lengths(model)
            for node in nodes:
                self._lower(model, node, lengths)
        return ir.passes.PassResult(model, bool(nodes))

    def _lower(self, model: ir.Model, node: ir.Node, lengths: tuple[ir.Value, ir.Value]) -> None:
        caches = rotary_caches(model, self.rotary_tables)
        inside = rotates_inside(self.limits, integer(node, "head_dim"), integer(node, "rotary_dimensions"))
        positions = None if inside else shared_position_ids(model)
        rewrite = Rewrite(model, node)
        *projected, past_key, past_value, _mask = node.inputs
        query, key, value = [*projected, None, None] if len(projected) == 1 else projected
        inputs: list[ir.Value | None]
        if positions is None:
            inputs = [query, key, value, past_key, past_value, *lengths, *caches]
        else:
            query, key, value = _outside(rewrite, (query, key, value), positions, caches)
            inputs = [query, key, value, past_key, past_value, *lengths]
        scales = cache_scales(rewrite, self.limits)
        if scales:
            inputs += [None] * (12 - len(inputs)) + list(scales)
        attributes = {
            "num_heads": integer(node, "heads"),
            "kv_num_heads": integer(node, "kv_heads"),
            "scale": number(node, "scale"),
            "do_rotary": int(positions is None),
            "rotary_interleaved": integer(node, "interleaved"),
            **_cache_attributes(self.limits),
        }
        rewrite.finish(*rewrite.op("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, outputs=3))


def _outside(
    rewrite: Rewrite, projected: Sequence[ir.Value | None], positions: ir.Value, caches: list[ir.Value]
) -> tuple[ir.Value | None, ...]:
    """Query, key and value, of which the first two are rotated here."""
    node = rewrite.node
    size = integer(node, "head_dim")
    heads, kv_heads = integer(node, "heads"), integer(node, "kv_heads")
    query, key, value = projected
    if key is None:
        query, key, value = rewrite.split(query, heads * size, kv_heads * size, kv_heads * size)

    def rotated(x: ir.Value | None, count: int) -> ir.Value:
        attributes = {
            "interleaved": integer(node, "interleaved"),
            "num_heads": count,
            # Zero means all of it, and then the heads need not be told apart.
            "rotary_embedding_dim": integer(node, "rotary_dimensions"),
        }
        return rewrite.op("RotaryEmbedding", [x, positions, *caches], attributes, domain=MICROSOFT)[0]

    return rotated(query, heads), rotated(key, kv_heads), value


def _cache_attributes(limits: GraphLimits) -> Mapping[str, Any]:
    if limits.kv_cache == "activations":
        return {}
    kind = "PER_CHANNEL" if limits.kv_scales == "channel" else "PER_TENSOR"
    return {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": CACHE_BITS[limits.kv_cache]}


def cache_scales(rewrite: Rewrite, limits: GraphLimits) -> list[ir.Value]:
    """Return the scales of the key and of the value cache, in the graph's own file.

    There are none where the cache is not quantized.
    """
    if limits.kv_cache == "activations":
        return []
    channels = (integer(rewrite.node, "kv_heads"), 1, integer(rewrite.node, "head_dim"))
    shape = channels if limits.kv_scales == "channel" else (1,)
    scales = []
    for kind in ("key", "value"):
        scale = rewrite.constant(CACHE_SCALE.format(block=rewrite.block, kind=kind), np.ones(shape, np.float32))
        scale.metadata_props[FLOAT32] = "1"
        scales.append(scale)
    return scales


def rotary_caches(model: ir.Model, tables: tuple[torch.Tensor, torch.Tensor]) -> list[ir.Value]:
    """Return the cosines and sines of every position of the context, once a graph."""
    return [
        weight(model.graph, name, ir.DataType.FLOAT, tuple(table.shape), table.numpy, SHARED_BLOCK)
        for name, table in zip(("cos_cache", "sin_cache"), tables, strict=True)
    ]


def shared_lengths(model: ir.Model) -> tuple[ir.Value, ir.Value]:
    """Return (sequence_lengths [B] int32, total_length [] int32) of the attention mask, computed once a graph."""
    graph = model.graph
    found = shared_values(model)
    if SEQUENCE_LENGTHS in found:
        return found[SEQUENCE_LENGTHS], found[TOTAL_LENGTH]
    mask = next(value for value in graph.inputs if value.name == ATTENTION_MASK)
    first = graph[0]
    rewrite = Rewrite(model, first)
    axis = rewrite.constant("axis_1", np.array([1], np.int64))
    one = rewrite.constant("one", np.array(1, np.int64))
    (count,) = rewrite.op("ReduceSum", [mask, axis], {"keepdims": 0})
    (last,) = rewrite.op("Sub", [count, one])
    (lengths,) = rewrite.op("Cast", [last], {"to": int(ir.DataType.INT32)})
    (shape,) = rewrite.op("Shape", [mask])
    (width,) = rewrite.op("Gather", [shape, one], {"axis": 0})
    (total,) = rewrite.op("Cast", [width], {"to": int(ir.DataType.INT32)})
    lengths.name, total.name = SEQUENCE_LENGTHS, TOTAL_LENGTH
    graph.insert_before(first, rewrite.nodes)
    return lengths, total


def shared_position_ids(model: ir.Model) -> ir.Value:
    """Return the positions [B, S] int64 of the new tokens, computed once a graph.

    The first new token of a sequence comes behind what the attention mask has ones for, less the new tokens. Padding
    is to the right, and in the first call only: there the sequences begin at 0, however few ones they have.
    """
    found = shared_values(model)
    if POSITIONS in found:
        return found[POSITIONS]
    lengths, total = shared_lengths(model)
    ids, before_all = input_ids(model), computing_node(total)
    rewrite = Rewrite(model, before_all)
    one, zero = rewrite.constant("one", np.array(1, np.int64)), rewrite.constant("zero", np.array(0, np.int64))
    (shape,) = rewrite.op("Shape", [ids])
    (count,) = rewrite.op("Gather", [shape, one], {"axis": 0})
    (last,) = rewrite.op("Cast", [lengths], {"to": int(ir.DataType.INT64)})
    (ones,) = rewrite.op("Add", [last, one])
    (before,) = rewrite.op("Sub", [ones, count])
    (start,) = rewrite.op("Max", [before, zero])
    (start,) = rewrite.op("Unsqueeze", [start, rewrite.integers(1)])
    (steps,) = rewrite.op("Range", [zero, count, one])
    (positions,) = rewrite.op("Add", [start, steps])
    positions.name = POSITIONS
    model.graph.insert_after(before_all, rewrite.nodes)
    return positions


def input_ids(model: ir.Model) -> ir.Value:
    """Return the graph's input [B, S] int64."""
    return next(value for value in model.graph.inputs if value.name == INPUT_IDS)


def computing_node(value: ir.Value) -> ir.Node:
    """Return the node that ``value`` comes of; behind that of a shared value, nodes that follow are inserted."""
    producer = value.producer()
    assert producer is not None, value.name
    return producer


def shared_values(model: ir.Model) -> dict[str | None, ir.Value]:
    """Return the values of the outermost graph, by name."""
    return {value.name: value for node in model.graph for value in node.outputs}
