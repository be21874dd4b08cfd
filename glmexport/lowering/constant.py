"""A matrix as numbers that the runtime computes once, when it loads the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from glmexport.lowering.codecs import LOWERINGS
from glmexport.lowering.rewrite import Rewrite
from glmexport.lowering.stored import note_stored, stored_part
from glmexport.quantization.weights import Weights


def constant_matrix(rewrite: Rewrite, weights: Weights, key: str) -> ir.Value:
    """Return the matrix with that checkpoint key [rows, columns] fp32.

    A quantized one is (code - zero point) * scale, in operators of the standard domain over constants: ONNX Runtime
    folds those when it loads a graph, but of its own domain nothing but quantization itself.
    """
    form, (rows, columns) = weights.form(key), weights.shape(key)
    if form is None:
        return rewrite.weight(key, ir.DataType.FLOAT, (rows, columns), lambda: weights.tensor(key).numpy())
    if form.codec in LOWERINGS:
        return LOWERINGS[form.codec].constant(rewrite, weights, key)
    groups = -(-columns // form.group_size)
    stored = stored_part(rewrite, weights, [key], "codes", f"{key}.codes")
    codes = as_numbers(rewrite, _unpacked(rewrite, stored, form.bits))
    scales = stored_part(rewrite, weights, [key], "scales", f"{key}.scales")
    held = {"codes": stored, "scales": scales}
    if form.symmetric:
        middle = np.array(2 ** (form.bits - 1), np.float32)
        (above,) = rewrite.op("Sub", [codes, rewrite.constant(f"middle_{form.bits}", middle)])
    else:
        packed = stored_part(rewrite, weights, [key], "zero_points", f"{key}.zero_points")
        held["zero_points"] = packed
        # The last byte of a row may be filled up.
        points = first_of(rewrite, _unpacked(rewrite, packed, form.bits), groups)
        (points,) = rewrite.op("Unsqueeze", [as_numbers(rewrite, points), rewrite.integers(2)])
        (above,) = rewrite.op("Sub", [codes, points])
    note_stored([key], form, held)
    (factors,) = rewrite.op("Unsqueeze", [as_numbers(rewrite, scales), rewrite.integers(2)])
    (matrix,) = rewrite.op("Mul", [above, factors])
    (matrix,) = rewrite.op("Reshape", [matrix, rewrite.integers(rows, -1)])
    return first_of(rewrite, matrix, columns)


def _unpacked(rewrite: Rewrite, packed: ir.Value, bits: int) -> ir.Value:
    """[..., n * 8 / bits] uint8 of [..., n] uint8, the first of the values in a byte in its lowest bits."""
    if bits == 8:
        return packed
    mask = rewrite.constant(f"mask_{bits}", np.array((1 << bits) - 1, np.uint8))
    fields: list[ir.Value] = []
    for shift in range(0, 8, bits):
        moved = packed
        if shift:
            places: NDArray[np.uint8] = np.array(shift, np.uint8)
            (moved,) = rewrite.op(
                "BitShift", [packed, rewrite.constant(f"shift_{shift}", places)], {"direction": "RIGHT"}
            )
        (field,) = rewrite.op("BitwiseAnd", [moved, mask])
        fields += rewrite.op("Unsqueeze", [field, rewrite.integers(-1)])
    (side_by_side,) = rewrite.op("Concat", fields, {"axis": -1})
    shape = packed.shape
    assert shape is not None
    return rewrite.op("Reshape", [side_by_side, rewrite.integers(*[0] * (len(shape) - 1), -1)])[0]


def as_numbers(rewrite: Rewrite, x: ir.Value) -> ir.Value:
    """Return ``x`` in the type of the activations."""
    return rewrite.op("Cast", [x], {"to": int(ir.DataType.FLOAT)})[0]


def first_of(rewrite: Rewrite, x: ir.Value, columns: int) -> ir.Value:
    """Return the first ``columns`` of the last axis."""
    ends = [rewrite.integers(0), rewrite.integers(columns), rewrite.integers(-1)]
    return rewrite.op("Slice", [x, *ends])[0]
