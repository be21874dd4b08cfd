"""Lowering of the router, which decides which experts every position goes to, and how much of each."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from glmexport.graph.operators import integer, nodes_of, number, text
from glmexport.lowering.rewrite import Rewrite
from glmexport.quantization.weights import Weights

#: The number that transformers adds to the sum of the weights before it divides by it.
_TINY = np.float32(1e-20)


class LowerRoutePass(ir.passes.InPlacePass):
    """A pass by which Route becomes TopK over scores and bias, and the chosen ones' scores.

    All of it is in fp32 on every target.

    1. The sigmoid is written out: ONNX Runtime's has an absolute error of 6e-8, which small scores cannot afford.
    2. The bias takes part in the choice only.
    3. A group that is not kept has scores of minus infinity.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every Route."""
        modified = False
        for node in nodes_of(model, "Route"):
            modified = True
            self._lower(Rewrite(model, node, float32=True))
        return ir.passes.PassResult(model, modified)

    def _lower(self, rewrite: Rewrite) -> None:
        node = rewrite.node
        key, experts, chosen = text(node, "bias"), integer(node, "experts"), integer(node, "chosen")
        bias = rewrite.weight(key, ir.DataType.FLOAT, (experts,), lambda: self.weights.tensor(key).numpy())
        rows = rewrite.constant(f"rows_of_{experts}", np.array([-1, experts], np.int64))
        one = rewrite.constant("one_fp32", np.array(1, np.float32))
        (logits,) = rewrite.op("Reshape", [node.inputs[0], rows])
        (negative,) = rewrite.op("Neg", [logits])
        (exponential,) = rewrite.op("Exp", [negative])
        (denominator,) = rewrite.op("Add", [exponential, one])
        (scores,) = rewrite.op("Reciprocal", [denominator])
        (biased,) = rewrite.op("Add", [scores, bias])
        if integer(node, "groups") > integer(node, "kept_groups"):
            biased = self._masked(rewrite, biased, rows)
        count = rewrite.constant(f"count_{chosen}", np.array([chosen], np.int64))
        _, indices = rewrite.op("TopK", [biased, count], outputs=2)
        (weights,) = rewrite.op("GatherElements", [scores, indices], {"axis": 1})
        if integer(node, "normalized"):
            last = rewrite.constant("axis_1", np.array([1], np.int64))
            (total,) = rewrite.op("ReduceSum", [weights, last], {"keepdims": 1})
            (total,) = rewrite.op("Add", [total, rewrite.constant("tiny_fp32", np.array(_TINY))])
            (weights,) = rewrite.op("Div", [weights, total])
        scale = number(node, "scale")
        if scale != 1:
            factor = rewrite.constant(f"times_{scale:.9g}", np.array(scale, np.float32))
            (weights,) = rewrite.op("Mul", [weights, factor])
        weights.type = ir.TensorType(ir.DataType.FLOAT)
        rewrite.finish(indices, weights)

    @staticmethod
    def _masked(rewrite: Rewrite, biased: ir.Value, rows: ir.Value) -> ir.Value:
        node = rewrite.node
        groups, kept = integer(node, "groups"), integer(node, "kept_groups")
        size = integer(node, "experts") // groups
        axis = rewrite.constant("axis_2", np.array([2], np.int64))
        grouped = rewrite.constant(f"groups_{groups}x{size}", np.array([-1, groups, size], np.int64))
        (apart,) = rewrite.op("Reshape", [biased, grouped])
        two = rewrite.constant("count_2", np.array([2], np.int64))
        best, _ = rewrite.op("TopK", [apart, two], outputs=2)
        (sums,) = rewrite.op("ReduceSum", [best, axis], {"keepdims": 0})
        count = rewrite.constant(f"count_{kept}", np.array([kept], np.int64))
        _, indices = rewrite.op("TopK", [sums, count], outputs=2)
        (chosen_shape,) = rewrite.op("Shape", [indices])
        (shape,) = rewrite.op("Shape", [sums])
        (ones,) = rewrite.op("ConstantOfShape", [chosen_shape], {"value": ir.tensor(np.ones(1, np.int64))})
        (zeros,) = rewrite.op("ConstantOfShape", [shape], {"value": ir.tensor(np.zeros(1, np.int64))})
        (marks,) = rewrite.op("ScatterElements", [zeros, indices, ones], {"axis": 1})
        (flags,) = rewrite.op("Cast", [marks], {"to": int(ir.DataType.BOOL)})
        (mask,) = rewrite.op("Unsqueeze", [flags, axis])
        never = rewrite.constant("never", np.array(-np.inf, np.float32))
        (masked,) = rewrite.op("Where", [mask, apart, never])
        return rewrite.op("Reshape", [masked, rows])[0]
