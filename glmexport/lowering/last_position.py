"""The positions whose logits are computed: one row in a prefill and not one a token, and all in a short step."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from glmexport.graph.operators import integer, nodes_of
from glmexport.lowering.attention import computing_node, input_ids, shared_lengths, shared_values
from glmexport.lowering.rewrite import Rewrite

_RECENT = "recent_positions"


class LowerLastPositionPass(ir.passes.InPlacePass):
    """A pass by which LastPosition becomes GatherND at min(S - 1, number of real positions - 1) of each sequence.

    1. In a padded prefill that is the last position before the padding.
    2. In a decode step, and in a prefill that continues a cache, S - 1 is the smaller one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every LastPosition."""
        modified = False
        for node in nodes_of(model, "LastPosition"):
            modified = True
            rewrite = Rewrite(model, node)
            _, index = _last(rewrite, node.inputs[0])
            axes = rewrite.constant("axes_1_2", np.array([1, 2], np.int64))
            (indices,) = rewrite.op("Unsqueeze", [index, axes])
            rewrite.finish(*rewrite.op("GatherND", [node.inputs[0], indices], {"batch_dims": 1}))
        return ir.passes.PassResult(model, modified)


class LowerRecentPositionsPass(ir.passes.InPlacePass):
    """A pass by which RecentPositions becomes GatherND at consecutive positions of each sequence.

    1. Of at most ``most`` positions all are gathered, from 0 on.
    2. Of more, one: the one that LastPosition gives.
    3. The indices are computed once a graph.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every RecentPositions."""
        nodes = list(nodes_of(model, "RecentPositions"))
        for node in nodes:
            indices = _shared_indices(model, node)
            rewrite = Rewrite(model, node)
            rewrite.finish(*rewrite.op("GatherND", [node.inputs[0], indices], {"batch_dims": 1}))
        return ir.passes.PassResult(model, bool(nodes))


def _shared_indices(model: ir.Model, node: ir.Node) -> ir.Value:
    """Recent positions [B, R, 1] int64 of the graph's input, computed once a graph, when its first ``node`` asks."""
    found = shared_values(model)
    if _RECENT in found:
        return found[_RECENT]
    _, total = shared_lengths(model)
    rewrite = Rewrite(model, node)
    positions, index = _last(rewrite, input_ids(model))
    zero, one = (rewrite.constant(name, np.array(n, np.int64)) for name, n in (("zero", 0), ("one", 1)))
    # Not LessOrEqual, which ONNX Runtime does not count among what it makes shapes of.
    long = rewrite.constant("long_step", np.array(integer(node, "most") + 1, np.int64))
    (short,) = rewrite.op("Less", [positions, long])
    (count,) = rewrite.op("Where", [short, positions, one])
    (first,) = rewrite.op("Where", [short, zero, index])
    # One number for all sequences, or one for each.
    (rows,) = rewrite.op("Shape", [index])
    (first,) = rewrite.op("Expand", [first, rows])
    (first,) = rewrite.op("Unsqueeze", [first, rewrite.integers(1)])
    (steps,) = rewrite.op("Range", [zero, count, one])
    (chosen,) = rewrite.op("Add", [first, steps])
    (indices,) = rewrite.op("Unsqueeze", [chosen, rewrite.integers(2)])
    indices.name = _RECENT
    model.graph.insert_after(computing_node(total), rewrite.nodes)
    return indices


def _last(rewrite: Rewrite, x: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """Number of positions of ``x`` [B, S, ...], and the last one [B] that is not padding; int64."""
    lengths, _ = shared_lengths(rewrite.model)
    one = rewrite.constant("one", np.array(1, np.int64))
    (shape,) = rewrite.op("Shape", [x])
    (positions,) = rewrite.op("Gather", [shape, one], {"axis": 0})
    (last,) = rewrite.op("Sub", [positions, one])
    (real,) = rewrite.op("Cast", [lengths], {"to": int(ir.DataType.INT64)})
    return positions, rewrite.op("Min", [last, real])[0]
