"""Attention as GroupQueryAttention, with the rotary embedding inside it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from glmexport.graph import ATTENTION_MASK
from glmexport.graph.operators import integer, nodes_of, number
from glmexport.lowering.rewrite import MICROSOFT, SHARED_BLOCK, Rewrite, weight

SEQUENCE_LENGTHS, TOTAL_LENGTH = "sequence_lengths", "total_length"


class LowerAttentionPass(ir.passes.InPlacePass):
    """Attention becomes GroupQueryAttention.

    1. The operator counts positions instead of masking them: ``sequence_lengths`` is the number of ones in each
       row of the attention mask minus one, ``total_length`` the width of the mask. Padding goes to the right.
    2. The width of the cos and sin caches tells it how much of a head is rotated.
    3. The scale is written out: the operator's default is right for one head size only.
    """

    def __init__(self, rotary_tables: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
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
        rewrite = Rewrite(model, node)
        *projected, past_key, past_value, _mask = node.inputs
        query, key, value = [*projected, None, None] if len(projected) == 1 else projected
        caches = rotary_caches(model, self.rotary_tables)
        outputs = rewrite.op(
            "GroupQueryAttention",
            [query, key, value, past_key, past_value, *lengths, *caches],
            {
                "num_heads": integer(node, "heads"),
                "kv_num_heads": integer(node, "kv_heads"),
                "scale": number(node, "scale"),
                "do_rotary": 1,
                "rotary_interleaved": integer(node, "interleaved"),
            },
            domain=MICROSOFT,
            outputs=3,
        )
        rewrite.finish(*outputs)


def rotary_caches(model: ir.Model, tables: tuple[torch.Tensor, torch.Tensor]) -> list[ir.Value]:
    """Cosines and sines of every position of the context, once a graph."""
    return [
        weight(model.graph, name, ir.DataType.FLOAT, tuple(table.shape), table.numpy, SHARED_BLOCK)
        for name, table in zip(("cos_cache", "sin_cache"), tables, strict=True)
    ]


def shared_lengths(model: ir.Model) -> tuple[ir.Value, ir.Value]:
    """(sequence_lengths [B] int32, total_length [] int32) of the attention mask, computed once a graph."""
    graph = model.graph
    for node in graph:
        if node.outputs[0].name == SEQUENCE_LENGTHS:
            total = next(other.outputs[0] for other in graph if other.outputs[0].name == TOTAL_LENGTH)
            return node.outputs[0], total
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
