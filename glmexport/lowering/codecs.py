"""The table of lowerings of codecs that have operators of their own; the affine one is lowered by form and bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from glmexport.foundation.recipe import CodecName
from glmexport.lowering.normal_float import normal_float_constant, normal_float_product
from glmexport.lowering.rewrite import Rewrite
from glmexport.quantization.weights import Weights


@dataclass(frozen=True)
class CodecLowering:
    """The two uses of a matrix in a graph.

    ``product``: the node's input times stacked matrices, by their checkpoint keys, plus a bias if there is one.
    ``constant``: one matrix [rows, columns] fp32 that the runtime computes when it loads the graph.
    """

    product: Callable[[Rewrite, Weights, list[str], ir.Value | None], ir.Value]
    constant: Callable[[Rewrite, Weights, str], ir.Value]


LOWERINGS: Mapping[CodecName, CodecLowering] = {"nf4": CodecLowering(normal_float_product, normal_float_constant)}
