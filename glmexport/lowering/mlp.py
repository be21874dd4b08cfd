"""Lowering of the gated activation between the MLP's matrices."""

from __future__ import annotations

import onnx_ir as ir

from glmexport.graph.operators import nodes_of
from glmexport.lowering.rewrite import Rewrite


class LowerGatedActivationPass(ir.passes.InPlacePass):
    """A pass by which GatedActivation becomes Split, Sigmoid and two Mul; ONNX Runtime fuses x * sigmoid(x) itself."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every GatedActivation."""
        modified = False
        for node in nodes_of(model, "GatedActivation"):
            modified = True
            rewrite = Rewrite(model, node)
            gate, up = rewrite.op("Split", [node.inputs[0]], {"axis": -1, "num_outputs": 2}, outputs=2)
            (sigmoid,) = rewrite.op("Sigmoid", [gate])
            (silu,) = rewrite.op("Mul", [gate, sigmoid])
            rewrite.finish(*rewrite.op("Mul", [silu, up]))
        return ir.passes.PassResult(model, modified)
