"""The last position of each sequence, so that a prefill computes one row of logits and not one a token."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from glmexport.graph import INPUT_IDS
from glmexport.graph.operators import nodes_of
from glmexport.lowering.attention import shared_lengths
from glmexport.lowering.rewrite import Rewrite


_INDICES = "last_positions"


class LowerLastPositionPass(ir.passes.InPlacePass):
    """LastPosition becomes GatherND at min(S - 1, number of real positions - 1) of each sequence.

    1. In a padded prefill that is the last position before the padding.
    2. In a decode step, and in a prefill that continues a cache, S - 1 is the smaller one.
    3. The indices are computed once a graph.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every LastPosition."""
        nodes = list(nodes_of(model, "LastPosition"))
        if nodes:
            indices = _indices(model)
            for node in nodes:
                rewrite = Rewrite(model, node)
                rewrite.finish(*rewrite.op("GatherND", [node.inputs[0], indices], {"batch_dims": 1}))
        return ir.passes.PassResult(model, bool(nodes))


def _indices(model: ir.Model) -> ir.Value:
    """The last position of each sequence, [B, 1, 1] int64."""
    lengths, _ = shared_lengths(model)
    graph = model.graph
    ids = next(value for value in graph.inputs if value.name == INPUT_IDS)
    producer = lengths.producer()
    assert producer is not None
    rewrite = Rewrite(model, producer)
    one = rewrite.constant("one", np.array(1, np.int64))
    axes = rewrite.constant("axes_1_2", np.array([1, 2], np.int64))
    (shape,) = rewrite.op("Shape", [ids])
    (positions,) = rewrite.op("Gather", [shape, one], {"axis": 0})
    (last,) = rewrite.op("Sub", [positions, one])
    (real,) = rewrite.op("Cast", [lengths], {"to": int(ir.DataType.INT64)})
    (index,) = rewrite.op("Min", [last, real])
    (indices,) = rewrite.op("Unsqueeze", [index, axes])
    indices.name = _INDICES
    graph.insert_after(producer, rewrite.nodes)
    return indices
