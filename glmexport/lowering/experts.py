"""Routed experts, each computed for the positions that chose it and for no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from glmexport.graph.operators import BLOCK, DOMAIN, integer, nodes_of, texts
from glmexport.lowering.rewrite import Rewrite


class LowerExpertsPass(ir.passes.InPlacePass):
    """A pass by which RoutedExperts becomes one If an expert, whose body is made of Linear and GatedActivation.

    1. The positions are sorted by expert, so that those of one expert are a slice; a position that chose C experts is
       there C times. The outputs of all experts, one after the other, are then in the order of that sort.
    2. The If of an expert that no position chose gives no rows and reads none of its weights. The weights belong to
       the outer graph, where ONNX Runtime packs them when it loads the model as it does those of every layer.
    3. The weighted sum over a position's experts is a matrix product.

    QMoE computes the same, in fewer formats and no faster: a decode step takes as long, 128 positions take half as long
    again (ONNX Runtime 1.32 on Zen 4; benchmarks/README.md, "Experts in the graph").
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every RoutedExperts."""
        modified = False
        for node in nodes_of(model, "RoutedExperts"):
            modified = True
            self._lower(Rewrite(model, node))
        return ir.passes.PassResult(model, modified)

    def _lower(self, rewrite: Rewrite) -> None:
        node = rewrite.node
        hidden, indices, weights = node.inputs
        assert hidden is not None
        keys = list(zip(texts(node, "gate_up"), texts(node, "down"), strict=True))
        size = integer(node, "hidden_size")
        first = rewrite.constant("axis_0", np.array([0], np.int64))
        middle = rewrite.constant("axis_1", np.array([1], np.int64))
        rows = rewrite.constant(f"rows_of_{size}", np.array([-1, size], np.int64))
        (flat,) = rewrite.op("Reshape", [hidden, rows])
        order, places, counts, chosen = _sorted(rewrite, indices, len(keys))
        (positions,) = rewrite.op("Div", [order, chosen])
        (inputs,) = rewrite.op("Gather", [flat, positions], {"axis": 0})
        (ends,) = rewrite.op("CumSum", [counts, rewrite.constant("axis_0_scalar", np.array(0, np.int64))])
        (starts,) = rewrite.op("Sub", [ends, counts])
        zero = rewrite.constant("zero", np.array(0, np.int64))
        (hits,) = rewrite.op("Greater", [counts, zero])
        bounds = [
            rewrite.op("Split", [value], {"axis": 0, "num_outputs": len(keys)}, outputs=len(keys))
            for value in (hits, starts, ends)
        ]
        nothing = rewrite.constant(f"no_rows_of_{size}", np.zeros((0, size), np.float32))
        outputs: list[ir.Value] = []
        for index, (hit, start, end) in enumerate(zip(*bounds, strict=True)):
            bodies = _bodies(rewrite, index, keys[index], (inputs, start, end, first), nothing)
            outputs += rewrite.op("If", [hit], bodies)
        (together,) = rewrite.op("Concat", outputs, {"axis": 0})
        (returned,) = rewrite.op("Gather", [together, places], {"axis": 0})
        (shape,) = rewrite.op("Shape", [indices])
        width = rewrite.constant(f"size_{size}", np.array([size], np.int64))
        (apart,) = rewrite.op("Concat", [shape, width], {"axis": 0})
        (grouped,) = rewrite.op("Reshape", [returned, apart])
        (row,) = rewrite.op("Unsqueeze", [weights, middle])
        (summed,) = rewrite.op("MatMul", [row, grouped])
        (whole,) = rewrite.op("Shape", [hidden])
        rewrite.finish(*rewrite.op("Reshape", [summed, whole]))


def _sorted(rewrite: Rewrite, indices: ir.Value | None, experts: int) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """The choices [T, C] in the order of their experts.

    Returns:
        ``order`` [T C]: which choice is at each place; ``places``, its inverse; ``counts`` [experts] of the choices;
        and C. All int64.
    """
    zero = rewrite.constant("zero", np.array(0, np.int64))
    one = rewrite.constant("one", np.array(1, np.int64))
    (flat,) = rewrite.op("Reshape", [indices, rewrite.constant("flat", np.array([-1], np.int64))])
    (length,) = rewrite.op("Shape", [flat])
    (scalar,) = rewrite.op("Squeeze", [length])
    (ascending,) = rewrite.op("Range", [zero, scalar, one])
    # Sorted by expert and then by position, so that the order does not hang on how ties are broken.
    (major,) = rewrite.op("Mul", [flat, scalar])
    (keys,) = rewrite.op("Add", [major, ascending])
    _, order = rewrite.op("TopK", [keys, length], {"axis": 0, "largest": 0}, outputs=2)
    (places,) = rewrite.op("ScatterElements", [ascending, order, ascending], {"axis": 0})
    (ones,) = rewrite.op("ConstantOfShape", [length], {"value": ir.tensor(np.ones(1, np.int64))})
    none = rewrite.constant(f"zeros_{experts}", np.zeros(experts, np.int64))
    (counts,) = rewrite.op("ScatterElements", [none, flat, ones], {"axis": 0, "reduction": "add"})
    (shape,) = rewrite.op("Shape", [indices])
    (chosen,) = rewrite.op("Gather", [shape, one], {"axis": 0})
    return order, places, counts, chosen


def _bodies(
    rewrite: Rewrite, index: int, keys: tuple[str, str], rows: tuple[ir.Value, ...], nothing: ir.Value
) -> dict[str, ir.Graph]:
    """Return the outputs of expert ``index`` for its ``rows`` (inputs, first, end, axis), and for none."""
    node = rewrite.node
    hidden, inner = integer(node, "hidden_size"), integer(node, "intermediate_size")
    name = f"{node.name}/{index}"
    nodes: list[ir.Node] = []

    def op(operator: str, inputs: list[ir.Value], domain: str = DOMAIN, **attributes: Any) -> ir.Value:
        output = ir.Value(name=f"{name}/{operator}_{len(nodes)}.0")
        values = ir.convenience.convert_attributes(attributes)
        label = f"{name}/{operator}_{len(nodes)}"
        nodes.append(
            ir.Node(
                domain, operator, inputs, values, outputs=[output], name=label, metadata_props={BLOCK: rewrite.block}
            )
        )
        return output

    part = op("Slice", list(rows), "")
    gate_up = op("Linear", [part], weights=[keys[0]], in_features=hidden, out_features=2 * inner)
    gated = op("GatedActivation", [gate_up], intermediate_size=inner)
    given = op("Linear", [gated], weights=[keys[1]], in_features=inner, out_features=hidden)
    chosen = _body(f"{name}/chosen", nodes, given, hidden)
    nodes = []
    empty = op("Identity", [nothing], "")
    return {"then_branch": chosen, "else_branch": _body(f"{name}/not", nodes, empty, hidden)}


def _body(name: str, nodes: list[ir.Node], output: ir.Value, size: int) -> ir.Graph:
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, size])
    return ir.Graph([], [output], nodes=nodes, name=name)
