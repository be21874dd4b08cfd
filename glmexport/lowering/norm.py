"""RMSNorm, with the residual addition before it where there is one."""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from glmexport.graph.operators import nodes_of, number, text
from glmexport.lowering.rewrite import MICROSOFT, Rewrite
from glmexport.quantization.weights import Weights
from glmexport.target import Target

FUSED = f"{MICROSOFT}::SkipSimplifiedLayerNormalization"


class LowerNormPass(ir.passes.InPlacePass):
    """RmsNorm becomes SkipSimplifiedLayerNormalization or SimplifiedLayerNormalization.

    1. Where its input is the sum of two values and the target has the fused operator, both become one node, whose
       fourth output is the sum that the residual stream goes on with.
    2. Otherwise SimplifiedLayerNormalization over the last axis, which ONNX Runtime serves in the default domain.
    """

    def __init__(self, weights: Weights, target: Target) -> None:
        super().__init__()
        self.weights = weights
        self.fuse = target.can(FUSED)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every RmsNorm."""
        modified = False
        for node in nodes_of(model, "RmsNorm"):
            modified = True
            rewrite = Rewrite(model, node)
            key = text(node, "weight")
            gain = rewrite.weight(key, ir.DataType.FLOAT, self.weights.shape(key), partial(self._gain, key))
            source = node.inputs[0]
            assert source is not None
            producer = source.producer()
            if self.fuse and producer is not None and (producer.domain, producer.op_type) == ("", "Add"):
                self._fused(rewrite, producer, gain)
            else:
                attributes = {"axis": -1, "epsilon": number(node, "epsilon"), "stash_type": 1}
                rewrite.finish(*rewrite.op("SimplifiedLayerNormalization", [source, gain], attributes))
        return ir.passes.PassResult(model, modified)

    def _gain(self, key: str) -> NDArray[Any]:
        return self.weights.tensor(key).numpy()

    @staticmethod
    def _fused(rewrite: Rewrite, addition: ir.Node, gain: ir.Value) -> None:
        normed, mean, deviation, total = rewrite.op(
            "SkipSimplifiedLayerNormalization",
            [*addition.inputs, gain],
            {"epsilon": number(rewrite.node, "epsilon")},
            domain=MICROSOFT,
            outputs=4,
        )
        # Absent optional outputs have no name.
        mean.name = deviation.name = ""
        ir.convenience.replace_all_uses_with(addition.outputs[0], total)
        rewrite.finish(normed, also=[addition])
