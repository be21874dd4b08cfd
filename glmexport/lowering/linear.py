"""Matrix products: quantized ones in the runtime's own format, the others as they are."""

from __future__ import annotations

import onnx_ir as ir
import torch

from glmexport.graph.operators import integer, nodes_of, texts
from glmexport.lowering.rewrite import MICROSOFT, Rewrite
from glmexport.quantization.weights import Weights
from glmexport.target import Target


class LowerLinearPass(ir.passes.InPlacePass):
    """Linear becomes MatMulNBits, or MatMul and Add.

    1. Scales are stored as fp16 and cast in the graph; ONNX Runtime folds the cast when it loads the model.
    2. Zero points are left out of symmetric formats: the operator's default is theirs, 2^(bits - 1).
    3. The bias goes into MatMulNBits.
    4. A tied lm_head shares the bytes of the embedding's codes, scales and zero points.
    """

    def __init__(self, weights: Weights, target: Target) -> None:
        super().__init__()
        self.weights = weights
        self.accuracy_level = target.weights.accuracy_level

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every Linear."""
        modified = False
        for node in nodes_of(model, "Linear"):
            modified = True
            keys = texts(node, "weights")
            rewrite = Rewrite(model, node)
            bias = self._bias(rewrite, texts(node, "biases"), integer(node, "out_features"))
            if self.weights.form(keys[0]) is None:
                rewrite.finish(self._plain(rewrite, keys, bias))
            else:
                rewrite.finish(self._quantized(rewrite, keys, bias))
        return ir.passes.PassResult(model, modified)

    def _bias(self, rewrite: Rewrite, keys: list[str], size: int) -> ir.Value | None:
        if not keys:
            return None
        return rewrite.weight(
            _name(keys),
            ir.DataType.FLOAT,
            (size,),
            lambda: torch.cat([self.weights.tensor(key) for key in keys]).numpy(),
        )

    def _plain(self, rewrite: Rewrite, keys: list[str], bias: ir.Value | None) -> ir.Value:
        node = rewrite.node
        matrix = rewrite.weight(
            f"{_name(keys)}.transposed",
            ir.DataType.FLOAT,
            (integer(node, "in_features"), integer(node, "out_features")),
            lambda: torch.cat([self.weights.tensor(key) for key in keys]).T.contiguous().numpy(),
        )
        (product,) = rewrite.op("MatMul", [node.inputs[0], matrix])
        return product if bias is None else rewrite.op("Add", [product, bias])[0]

    def _quantized(self, rewrite: Rewrite, keys: list[str], bias: ir.Value | None) -> ir.Value:
        node, name = rewrite.node, _name(keys)
        form = self.weights.form(keys[0])
        assert form is not None
        rows, size = integer(node, "out_features"), integer(node, "in_features")
        groups = -(-size // form.group_size)

        codes = rewrite.weight(
            f"{name}.q",
            ir.DataType.UINT8,
            (rows, groups, form.group_size * form.bits // 8),
            lambda: self.weights.packed(keys, "codes").numpy(),
            same_bytes_as=f"{name}.codes",
        )
        scales = rewrite.weight(
            f"{name}.scales",
            ir.DataType.FLOAT16,
            (rows, groups),
            lambda: self.weights.packed(keys, "scales").numpy(),
        )
        (cast,) = rewrite.op("Cast", [scales], {"to": int(ir.DataType.FLOAT)})
        zero_points = None
        if not form.symmetric:
            zero_points = rewrite.weight(
                f"{name}.zero_points",
                ir.DataType.UINT8,
                (rows, -(-groups * form.bits // 8)),
                lambda: self.weights.packed(keys, "zero_points").numpy(),
            )
        inputs = [node.inputs[0], codes, cast, zero_points, None, bias]
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


def _name(keys: list[str]) -> str:
    """One name for stacked tensors: ``...self_attn.q_proj+k_proj+v_proj.weight``."""
    if len(keys) == 1:
        return keys[0]
    parts = [key.rsplit(".", 2) for key in keys]
    return f"{parts[0][0]}.{'+'.join(part[1] for part in parts)}.{parts[0][2]}"
