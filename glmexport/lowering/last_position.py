"""The last position of each sequence, so that a prefill computes one row of logits and not one a token."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from glmexport.graph.operators import nodes_of
from glmexport.lowering.attention import shared_lengths
from glmexport.lowering.rewrite import Rewrite


class LowerLastPositionPass(ir.passes.InPlacePass):
    """LastPosition becomes GatherND at min(S - 1, number of real positions - 1) of each sequence.

    1. In a padded prefill that is the last position before the padding.
    2. In a decode step, and in a prefill that continues a cache, S - 1 is the smaller one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every LastPosition."""
        modified = False
        for node in nodes_of(model, "LastPosition"):
            modified = True
            lengths, _ = shared_lengths(model)
            rewrite = Rewrite(model, node)
            hidden = node.inputs[0]
            one = rewrite.constant("one", np.array(1, np.int64))
            axes = rewrite.constant("axes_1_2", np.array([1, 2], np.int64))
            (shape,) = rewrite.op("Shape", [hidden])
            (positions,) = rewrite.op("Gather", [shape, one], {"axis": 0})
            (last,) = rewrite.op("Sub", [positions, one])
            (real,) = rewrite.op("Cast", [lengths], {"to": int(ir.DataType.INT64)})
            (index,) = rewrite.op("Min", [last, real])
            (indices,) = rewrite.op("Unsqueeze", [index, axes])
            rewrite.finish(*rewrite.op("GatherND", [hidden, indices], {"batch_dims": 1}))
        return ir.passes.PassResult(model, modified)
