"""Lowering of the RMSNorm of every head of the queries and keys."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from glmexport.foundation.target import Target
from glmexport.graph.operators import integer, nodes_of, text
from glmexport.lowering.norm import normalize
from glmexport.lowering.rewrite import Rewrite
from glmexport.quantization.weights import Weights


class LowerHeadNormPass(ir.passes.InPlacePass):
    """A pass by which HeadNorm becomes the target's RMSNorm over the last axis of [B, S, heads, head_dim].

    GroupQueryAttention takes the gains itself on other providers; ONNX Runtime's CPU kernel refuses them.
    """

    def __init__(self, weights: Weights, target: Target) -> None:
        super().__init__()
        self.weights = weights
        self.form = target.graph.norm

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every HeadNorm."""
        modified = False
        for node in nodes_of(model, "HeadNorm"):
            modified = True
            rewrite = Rewrite(model, node, float32=self.form == "arithmetic")
            key, size = text(node, "weight"), integer(node, "head_dim")
            gain = rewrite.weight(key, ir.DataType.FLOAT, (size,), partial(self._read, key))
            apart = rewrite.constant(f"heads_of_{size}", np.array([0, 0, -1, size], np.int64))
            together = rewrite.constant("heads_together", np.array([0, 0, -1], np.int64))
            (heads,) = rewrite.op("Reshape", [node.inputs[0], apart])
            normed = normalize(rewrite, heads, gain, self.form)
            (output,) = rewrite.op("Reshape", [normed, together])
            output.type = normed.type
            rewrite.finish(output)
        return ir.passes.PassResult(model, modified)

    def _read(self, key: str) -> NDArray[Any]:
        return self.weights.tensor(key).numpy()
