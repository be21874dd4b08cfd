"""RMSNorm, with the residual addition before it where there is one."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from glmexport.foundation.target import Target
from glmexport.graph.operators import nodes_of, number, text
from glmexport.lowering.rewrite import MICROSOFT, Rewrite
from glmexport.quantization.weights import Weights

FUSED = f"{MICROSOFT}::SkipSimplifiedLayerNormalization"


class LowerNormPass(ir.passes.InPlacePass):
    """A pass by which RmsNorm becomes SkipSimplifiedLayerNormalization or SimplifiedLayerNormalization.

    1. Where its input is the sum of two values and the target has the fused operator, both become one node, whose
       fourth output is the sum that the residual stream goes on with.
    2. Otherwise SimplifiedLayerNormalization over the last axis, which ONNX Runtime serves in the default domain, or
       the standard operators that it consists of.
    """

    def __init__(self, weights: Weights, target: Target) -> None:
        super().__init__()
        self.weights = weights
        self.fuse = target.can(FUSED)
        self.form = target.graph.norm

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every RmsNorm."""
        modified = False
        for node in nodes_of(model, "RmsNorm"):
            modified = True
            source = node.inputs[0]
            assert source is not None
            producer = source.producer()
            fuse = self.fuse and producer is not None and (producer.domain, producer.op_type) == ("", "Add")
            rewrite = Rewrite(model, node, float32=not fuse and self.form == "arithmetic")
            key = text(node, "weight")
            gain = rewrite.weight(key, ir.DataType.FLOAT, self.weights.shape(key), partial(self._gain, key))
            if fuse and producer is not None:
                self._fused(rewrite, producer, gain)
            else:
                rewrite.finish(normalize(rewrite, source, gain, self.form))
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


def normalize(rewrite: Rewrite, x: ir.Value | None, gain: ir.Value, form: str) -> ir.Value:
    """Return the RMSNorm of ``x`` over its last axis, with the node's epsilon; sums are in fp32 in either form."""
    epsilon = number(rewrite.node, "epsilon")
    if form == "operator":
        attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        return rewrite.op("SimplifiedLayerNormalization", [x, gain], attributes)[0]
    (square,) = rewrite.op("Mul", [x, x])
    (mean,) = rewrite.op("ReduceMean", [square, rewrite.integers(-1)], {"keepdims": 1})
    (above,) = rewrite.op("Add", [mean, rewrite.constant(f"epsilon_{epsilon!r}", np.array(epsilon, np.float32))])
    (root,) = rewrite.op("Sqrt", [above])
    (even,) = rewrite.op("Div", [x, root])
    (output,) = rewrite.op("Mul", [even, gain])
    output.type = ir.TensorType(ir.DataType.FLOAT)
    return output
