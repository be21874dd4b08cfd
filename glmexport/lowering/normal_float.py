"""Matrices in NF4: products by the runtime's own operator, and numbers that it computes when it loads the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from glmexport.formats.normal_float import LEVELS
from glmexport.graph.operators import integer
from glmexport.lowering.rewrite import MICROSOFT, Rewrite
from glmexport.lowering.stored import note_stored, stacked_name, stored_part
from glmexport.quantization.weights import Weights

#: The number of the codec in MatMulBnb4.
_NF4 = 1


def normal_float_product(rewrite: Rewrite, weights: Weights, keys: list[str], bias: ir.Value | None) -> ir.Value:
    """Return the node's input times the stacked matrices by MatMulBnb4, and the ``bias`` added to it.

    The operator takes codes and scales as one row after the other, without axes. The CPU's kernel makes one matrix at
    a time numbers, anew at each call: memory for the largest matrix in fp32 comes on top, and a decode step takes 25
    times as long as MatMulNBits' (ONNX Runtime 1.32, 4096 x 4096 on one core: 22 and 0.9 ms).
    """
    node, name = rewrite.node, stacked_name(keys)
    form = weights.form(keys[0])
    assert form is not None
    rows, size = integer(node, "out_features"), integer(node, "in_features")
    codes = stored_part(rewrite, weights, keys, "codes", f"{name}.q", flat=1)
    scales = stored_part(rewrite, weights, keys, "scales", f"{name}.scales", flat=1)
    note_stored(keys, form, {"codes": codes, "scales": scales})
    (cast,) = rewrite.op("Cast", [scales], {"to": int(ir.DataType.FLOAT)})
    attributes = {"K": size, "N": rows, "block_size": form.group_size, "quant_type": _NF4}
    (product,) = rewrite.op("MatMulBnb4", [node.inputs[0], codes, cast], attributes, domain=MICROSOFT)
    if bias is not None:
        (product,) = rewrite.op("Add", [product, bias])
    product.type = ir.TensorType(ir.DataType.FLOAT)
    return product


def normal_float_constant(rewrite: Rewrite, weights: Weights, key: str) -> ir.Value:
    """Return the matrix with that checkpoint key [rows, columns] fp32, in operators over constants."""
    form, (rows, columns) = weights.form(key), weights.shape(key)
    assert form is not None
    codes = stored_part(rewrite, weights, [key], "codes", f"{key}.codes")
    scales = stored_part(rewrite, weights, [key], "scales", f"{key}.scales")
    groups = columns // form.group_size
    note_stored([key], form, {"codes": codes, "scales": scales})
    places = rewrite.constant("shift_4", np.array(4, np.uint8))
    (high,) = rewrite.op("BitShift", [codes, places], {"direction": "RIGHT"})
    (low,) = rewrite.op("BitwiseAnd", [codes, rewrite.constant("mask_4", np.array(15, np.uint8))])
    halves = [rewrite.op("Unsqueeze", [half, rewrite.integers(-1)])[0] for half in (high, low)]
    (pairs,) = rewrite.op("Concat", halves, {"axis": -1})
    (chosen,) = rewrite.op("Cast", [pairs], {"to": int(ir.DataType.INT32)})
    levels = rewrite.constant("nf4_levels", np.array(LEVELS, np.float32))
    (numbers,) = rewrite.op("Gather", [levels, chosen], {"axis": 0})
    (grouped,) = rewrite.op("Reshape", [numbers, rewrite.integers(rows, groups, form.group_size)])
    (steps,) = rewrite.op("Cast", [scales], {"to": int(ir.DataType.FLOAT)})
    (factors,) = rewrite.op("Unsqueeze", [steps, rewrite.integers(2)])
    (matrix,) = rewrite.op("Mul", [grouped, factors])
    return rewrite.op("Reshape", [matrix, rewrite.integers(rows, columns)])[0]
