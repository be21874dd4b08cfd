"""Query, key and value projections as one matrix product."""

from __future__ import annotations

import onnx_ir as ir

from glmexport.graph.operators import integer, nodes_of, texts
from glmexport.lowering.rewrite import Rewrite
from glmexport.quantization.weights import Weights


class PackQkvPass(ir.passes.InPlacePass):
    """A pass that replaces the three Linear nodes that feed an Attention by one.

    1. They read the same value and their matrices have the same format (full precision counts as one).
    2. Rows are stacked in the order query, key, value, which is what GroupQueryAttention expects.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Pack wherever the rules hold."""
        modified = False
        for attention in nodes_of(model, "Attention"):
            linears = [value.producer() for value in attention.inputs[:3] if value is not None]
            if self._can_be_packed(linears):
                self._pack(model, attention, [linear for linear in linears if linear is not None])
                modified = True
        return ir.passes.PassResult(model, modified)

    def _can_be_packed(self, linears: list[ir.Node | None]) -> bool:
        if len(linears) != 3 or any(linear is None or linear.op_type != "Linear" for linear in linears):
            return False
        present = [linear for linear in linears if linear is not None]
        forms = {self.weights.form(key) for linear in present for key in texts(linear, "weights")}
        return len({linear.inputs[0] for linear in present}) == 1 and len(forms) == 1

    def _pack(self, model: ir.Model, attention: ir.Node, linears: list[ir.Node]) -> None:
        last = linears[-1]
        rewrite = Rewrite(model, last)
        biases = [key for linear in linears for key in texts(linear, "biases")]
        (packed,) = rewrite.op(
            "Linear",
            [linears[0].inputs[0]],
            {
                "weights": [key for linear in linears for key in texts(linear, "weights")],
                "in_features": integer(last, "in_features"),
                "out_features": sum(integer(linear, "out_features") for linear in linears),
                **({"biases": biases} if biases else {}),
            },
            domain=last.domain,
        )
        tail = list(attention.inputs[3:])
        model.graph.insert_after(last, rewrite.nodes)
        attention.resize_inputs(1 + len(tail))
        for index, value in enumerate([packed, *tail]):
            attention.replace_input_with(index, value)
        model.graph.remove(linears, safe=True)
