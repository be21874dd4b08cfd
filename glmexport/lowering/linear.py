"""Matrix products: quantized ones in the runtime's own format, the others as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from glmexport.foundation.recipe import Format
from glmexport.foundation.target import Target
from glmexport.graph.operators import integer, nodes_of, texts
from glmexport.lowering.codecs import LOWERINGS
from glmexport.lowering.rewrite import MICROSOFT, Rewrite
from glmexport.lowering.stored import note_stored, stacked_name, stored_part
from glmexport.quantization.weights import Weights


class LowerLinearPass(ir.passes.InPlacePass):
    """A pass by which Linear becomes MatMulNBits, or MatMul and Add, over DequantizeLinear for QDQ targets.

    1. Scales are stored as fp16 and cast in the graph; ONNX Runtime folds the cast when it loads the model.
    2. Zero points are left out of symmetric formats: the operator's default is theirs, 2^(bits - 1).
    3. The bias goes into MatMulNBits.
    4. A tied lm_head shares the bytes of the embedding's codes, scales and zero points; not in QDQ form, whose matrices
       are transposed.
    5. In QDQ form a symmetric matrix has signed codes and no zero points, another unsigned ones with them. The numbers
       are those of MatMulNBits, (code - zero point) * scale.
    """

    def __init__(self, weights: Weights, target: Target) -> None:
        super().__init__()
        self.weights = weights
        self.accuracy_level = target.weights.accuracy_level
        self._affine = self._dequantized if target.weights.form == "QDQ" else self._packed

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every Linear."""
        modified = False
        for node in nodes_of(model, "Linear"):
            modified = True
            keys = texts(node, "weights")
            rewrite = Rewrite(model, node, float32="float32" in node.attributes)
            bias = self._bias(rewrite, texts(node, "biases"), integer(node, "out_features"))
            form = self.weights.form(keys[0])
            if form is None:
                rewrite.finish(self._plain(rewrite, keys, bias))
            elif form.codec == "affine":
                rewrite.finish(self._affine(rewrite, keys, bias))
            else:
                rewrite.finish(LOWERINGS[form.codec].product(rewrite, self.weights, keys, bias))
        return ir.passes.PassResult(model, modified)

    def _bias(self, rewrite: Rewrite, keys: list[str], size: int) -> ir.Value | None:
        if not keys:
            return None
        return rewrite.weight(
            stacked_name(keys),
            ir.DataType.FLOAT,
            (size,),
            lambda: torch.cat([self.weights.tensor(key) for key in keys]).numpy(),
        )

    def _plain(self, rewrite: Rewrite, keys: list[str], bias: ir.Value | None) -> ir.Value:
        node = rewrite.node
        matrix = rewrite.weight(
            f"{stacked_name(keys)}.transposed",
            ir.DataType.FLOAT,
            (integer(node, "in_features"), integer(node, "out_features")),
            lambda: torch.cat([self.weights.tensor(key) for key in keys]).T.contiguous().numpy(),
        )
        return _product(rewrite, matrix, bias)

    def _layout(self, node: ir.Node, keys: list[str]) -> tuple[Format, int, int, int]:
        """Format, rows, columns and groups a row of the stacked matrices."""
        form = self.weights.form(keys[0])
        assert form is not None
        size = integer(node, "in_features")
        return form, integer(node, "out_features"), size, -(-size // form.group_size)

    def _dequantized(self, rewrite: Rewrite, keys: list[str], bias: ir.Value | None) -> ir.Value:
        name = stacked_name(keys)
        form, rows, size, groups = self._layout(rewrite.node, keys)
        dtype = SIGNED[form.bits] if form.symmetric else UNSIGNED[form.bits]

        def codes() -> NDArray[Any]:
            unsigned = torch.cat([self.weights.quantized(key).codes for key in keys]).T.numpy()
            middle = 2 ** (form.bits - 1) if form.symmetric else 0
            return np.asarray((unsigned.astype(np.int16) - middle).astype(dtype.numpy()))

        def zero_points() -> NDArray[Any]:
            points = [self.weights.quantized(key).zero_points for key in keys]
            stacked = torch.cat([each for each in points if each is not None])
            return np.asarray(stacked.T.numpy().astype(dtype.numpy()))

        def scales() -> NDArray[Any]:
            steps: NDArray[Any] = self.weights.packed(keys, "scales").T.numpy()
            return steps

        stored = rewrite.weight(f"{name}.q", dtype, (size, rows), codes)
        # An embedding that is the lm_head as well has scales and zero points of that name, the other way round.
        parts = f"{name}.q" if f"{name}.codes" in rewrite.graph.initializers else name
        scale = rewrite.weight(f"{parts}.scales", ir.DataType.FLOAT16, (groups, rows), scales)
        (cast,) = rewrite.op("Cast", [scale], {"to": int(ir.DataType.FLOAT)})
        inputs, held = [stored, cast], {"codes": stored, "scales": scale}
        if not form.symmetric:
            held["zero_points"] = rewrite.weight(f"{parts}.zero_points", dtype, (groups, rows), zero_points)
            inputs.append(held["zero_points"])
        note_stored(keys, form, held, "columns")
        (matrix,) = rewrite.op("DequantizeLinear", inputs, {"axis": 0, "block_size": form.group_size})
        return _product(rewrite, matrix, bias)

    def _packed(self, rewrite: Rewrite, keys: list[str], bias: ir.Value | None) -> ir.Value:
        node, name = rewrite.node, stacked_name(keys)
        form, rows, size, _ = self._layout(node, keys)
        held = {"codes": stored_part(rewrite, self.weights, keys, "codes", f"{name}.q", same_bytes_as=f"{name}.codes")}
        held["scales"] = stored_part(rewrite, self.weights, keys, "scales", f"{name}.scales")
        (cast,) = rewrite.op("Cast", [held["scales"]], {"to": int(ir.DataType.FLOAT)})
        if not form.symmetric:
            held["zero_points"] = stored_part(rewrite, self.weights, keys, "zero_points", f"{name}.zero_points")
        note_stored(keys, form, held)
        inputs = [node.inputs[0], held["codes"], cast, held.get("zero_points"), None, bias]
        while inputs[-1] is None:
            inputs.pop()
        return rewrite.op(
            "MatMulNBits",
            inputs,
            {
                "K": size,
                "N": rows,
                "bits": form.bits,
                "block_size": form.group_size,
                "accuracy_level": self.accuracy_level,
            },
            domain=MICROSOFT,
        )[0]


#: Element types of codes in QDQ form, by bits. Opset 21 has none of 2 bits.
SIGNED = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
UNSIGNED = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


def _product(rewrite: Rewrite, matrix: ir.Value, bias: ir.Value | None) -> ir.Value:
    """Return the node's input times ``matrix`` [in, out]; its type is said where it is not the activations'."""
    (product,) = rewrite.op("MatMul", [rewrite.node.inputs[0], matrix])
    if bias is not None:
        (product,) = rewrite.op("Add", [product, bias])
    product.type = ir.TensorType(ir.DataType.FLOAT)
    return product
