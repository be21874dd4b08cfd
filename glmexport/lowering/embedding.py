"""Lowering of embedding lookups."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from glmexport.foundation.recipe import Format
from glmexport.foundation.target import Target
from glmexport.graph.operators import nodes_of, text
from glmexport.lowering.constant import as_numbers, first_of
from glmexport.lowering.rewrite import MICROSOFT, Rewrite
from glmexport.lowering.stored import note_stored, stored_part
from glmexport.quantization.weights import Weights

FUSED = f"{MICROSOFT}::GatherBlockQuantized"

#: A byte of zero points in the middle of the range, by bits.
_MIDDLE = {2: 0xAA, 4: 0x88, 8: 0x80}


class LowerEmbeddingPass(ir.passes.InPlacePass):
    """A pass by which Embedding becomes GatherBlockQuantized over codes, or Gather over fp32 rows.

    1. Zero points are always written out: the operator's default differs between 2, 4 and 8 bits.
    2. Where the target has no GatherBlockQuantized, rows of codes, scales and zero points are gathered and become
       numbers by standard arithmetic: a row is little work, and the table is never a table of floats.
    """

    def __init__(self, weights: Weights, target: Target) -> None:
        super().__init__()
        self.weights = weights
        self.fused = target.can(FUSED)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every Embedding."""
        modified = False
        for node in nodes_of(model, "Embedding"):
            rewrite = Rewrite(model, node)
            key = text(node, "weight")
            if self.weights.form(key) is None:
                rewrite.finish(self._plain(rewrite, key))
            else:
                rewrite.finish(self._quantized(rewrite, key))
            modified = True
        return ir.passes.PassResult(model, modified)

    def _plain(self, rewrite: Rewrite, key: str) -> ir.Value:
        table = rewrite.weight(
            key, ir.DataType.FLOAT, self.weights.shape(key), lambda: self.weights.tensor(key).numpy()
        )
        return rewrite.op("Gather", [table, rewrite.node.inputs[0]], {"axis": 0})[0]

    def _quantized(self, rewrite: Rewrite, key: str) -> ir.Value:
        form = self.weights.form(key)
        assert form is not None
        rows, size = self.weights.shape(key)
        groups = -(-size // form.group_size)
        packed_groups = -(-groups * form.bits // 8)

        def zero_points() -> NDArray[np.uint8]:
            if form.symmetric:
                return np.full((rows, packed_groups), _MIDDLE[form.bits], np.uint8)
            points: NDArray[np.uint8] = self.weights.packed([key], "zero_points").numpy()
            return points

        codes = stored_part(rewrite, self.weights, [key], "codes", f"{key}.codes", flat=2)
        scales = stored_part(rewrite, self.weights, [key], "scales", f"{key}.scales")
        if not self.fused:
            points = None
            if not form.symmetric:
                points = stored_part(rewrite, self.weights, [key], "zero_points", f"{key}.zero_points")
            held = {"codes": codes, "scales": scales} | ({} if points is None else {"zero_points": points})
            note_stored([key], form, held)
            return self._rows(rewrite, form, (codes, scales, points))
        zero = rewrite.weight(f"{key}.zero_points", ir.DataType.UINT8, (rows, packed_groups), zero_points)
        spelled_out = form.model_copy(update={"symmetric": False})
        note_stored([key], spelled_out, {"codes": codes, "scales": scales, "zero_points": zero})
        (cast,) = rewrite.op("Cast", [scales], {"to": int(ir.DataType.FLOAT)})
        (embedded,) = rewrite.op(
            "GatherBlockQuantized",
            [codes, rewrite.node.inputs[0], cast, zero],
            {"bits": form.bits, "block_size": form.group_size, "gather_axis": 0, "quantize_axis": 1},
            domain=MICROSOFT,
        )
        return embedded

    @staticmethod
    def _rows(rewrite: Rewrite, form: Format, stored: tuple[ir.Value, ir.Value, ir.Value | None]) -> ir.Value:
        """[B, S, D] of gathered codes [B, S, D * bits / 8], scales [B, S, groups] and zero points."""
        codes, scales, points = (
            None if each is None else rewrite.op("Gather", [each, rewrite.node.inputs[0]], {"axis": 0})[0]
            for each in stored
        )
        assert codes is not None and scales is not None and stored[1].shape is not None
        groups = int(stored[1].shape.numpy()[1])
        apart = rewrite.integers(0, 0, groups, form.group_size)
        (numbers,) = rewrite.op("Reshape", [_unpacked(rewrite, codes, form.bits), apart])
        if points is None:
            zero = rewrite.constant(f"middle_{form.bits}", np.array(2 ** (form.bits - 1), np.float32))
        else:
            # The last byte of a row may be filled up.
            cut = first_of(rewrite, _unpacked(rewrite, points, form.bits), groups)
            (zero,) = rewrite.op("Unsqueeze", [cut, rewrite.integers(3)])
        (above,) = rewrite.op("Sub", [numbers, zero])
        (steps,) = rewrite.op("Unsqueeze", [as_numbers(rewrite, scales), rewrite.integers(3)])
        (rows,) = rewrite.op("Mul", [above, steps])
        return rewrite.op("Reshape", [rows, rewrite.integers(0, 0, groups * form.group_size)])[0]


def _unpacked(rewrite: Rewrite, packed: ir.Value, bits: int) -> ir.Value:
    """Numbers [B, S, n * 8 / bits] of bytes [B, S, n], the first of those in a byte in its lowest bits.

    By division, not by shifts: OpenVINO 2025.4 gets the latter wrong. Bytes are exact in any floating-point type.
    """
    rest = as_numbers(rewrite, packed)
    if bits == 8:
        return rest
    base = rewrite.constant(f"base_{2**bits}", np.array(2**bits, np.float32))
    inverse = rewrite.constant(f"inverse_{2**bits}", np.array(2.0**-bits, np.float32))
    fields: list[ir.Value] = []
    for _ in range(8 // bits - 1):
        (above,) = rewrite.op("Mul", [rest, inverse])
        (above,) = rewrite.op("Floor", [above])
        (lifted,) = rewrite.op("Mul", [above, base])
        fields += rewrite.op("Sub", [rest, lifted])
        rest = above
    apart = [rewrite.op("Unsqueeze", [field, rewrite.integers(-1)])[0] for field in (*fields, rest)]
    (side_by_side,) = rewrite.op("Concat", apart, {"axis": -1})
    return rewrite.op("Reshape", [side_by_side, rewrite.integers(0, 0, -1)])[0]
