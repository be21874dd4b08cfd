"""Embedding lookups."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from glmexport.graph.operators import nodes_of, text
from glmexport.lowering.rewrite import MICROSOFT, Rewrite
from glmexport.quantization.weights import Weights

#: A byte of zero points in the middle of the range, by bits.
_MIDDLE = {2: 0xAA, 4: 0x88, 8: 0x80}


class LowerEmbeddingPass(ir.passes.InPlacePass):
    """Embedding becomes GatherBlockQuantized over codes, or Gather over fp32 rows.

    1. Zero points are always written out: the operator's default differs between 2, 4 and 8 bits.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights

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

        codes = rewrite.weight(
            f"{key}.codes",
            ir.DataType.UINT8,
            (rows, groups * form.group_size * form.bits // 8),
            lambda: self.weights.packed([key], "codes").flatten(1).numpy(),
        )
        scales = rewrite.weight(
            f"{key}.scales",
            ir.DataType.FLOAT16,
            (rows, groups),
            lambda: self.weights.packed([key], "scales").numpy(),
        )
        zero = rewrite.weight(f"{key}.zero_points", ir.DataType.UINT8, (rows, packed_groups), zero_points)
        (cast,) = rewrite.op("Cast", [scales], {"to": int(ir.DataType.FLOAT)})
        (embedded,) = rewrite.op(
            "GatherBlockQuantized",
            [codes, rewrite.node.inputs[0], cast, zero],
            {"bits": form.bits, "block_size": form.group_size, "gather_axis": 0, "quantize_axis": 1},
            domain=MICROSOFT,
        )
        return embedded
