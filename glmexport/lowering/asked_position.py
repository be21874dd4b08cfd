"""The position whose logits are asked for by an input of the graph."""

from __future__ import annotations

import onnx_ir as ir

from glmexport.graph.operators import nodes_of
from glmexport.lowering.rewrite import Rewrite


class LowerAskedPositionPass(ir.passes.InPlacePass):
    """A pass by which AskedPosition becomes Gather along the positions."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every AskedPosition."""
        modified = False
        for node in nodes_of(model, "AskedPosition"):
            modified = True
            rewrite = Rewrite(model, node)
            rewrite.finish(*rewrite.op("Gather", node.inputs, {"axis": 1}))
        return ir.passes.PassResult(model, modified)
