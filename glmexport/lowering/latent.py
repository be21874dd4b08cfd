"""Latent attention: over one cached latent a token, or over the keys and values of every head."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from glmexport.graph.operators import DOMAIN, integer, nodes_of, number, text
from glmexport.lowering.attention import rotary_caches
from glmexport.lowering.capacity import rotate, scores_of, shared_positions, write_to_cache
from glmexport.lowering.constant import constant_matrix
from glmexport.lowering.rewrite import Rewrite
from glmexport.quantization.weights import Weights


class LowerSplitLatentPass(ir.passes.InPlacePass):
    """A pass by which SplitLatent becomes Split."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every SplitLatent."""
        modified = False
        for node in nodes_of(model, "SplitLatent"):
            modified = True
            rewrite = Rewrite(model, node)
            rewrite.finish(*rewrite.split(node.inputs[0], integer(node, "rank"), integer(node, "rope")))
        return ir.passes.PassResult(model, modified)


class LowerExpandedAttentionPass(ir.passes.InPlacePass):
    """A pass by which ExpandedAttention becomes Attention over the keys and values that a Linear makes of new latents.

    1. Attention rotates the first dimensions of a head and latent attention the last, so queries and keys are put
       together the other way round; a product of the two does not depend on the order.
    2. Keys and values get one size: zeros behind a key change no score, and those behind a value are cut off.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every ExpandedAttention."""
        modified = False
        for node in nodes_of(model, "ExpandedAttention"):
            modified = True
            self._lower(model, node)
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _lower(model: ir.Model, node: ir.Node) -> None:
        rewrite = Rewrite(model, node)
        heads, nope, rope, value = (integer(node, name) for name in ("heads", "nope", "rope", "value"))
        size = integer(node, "size")
        query, latent, rotary_key, past_key, past_value, mask = node.inputs

        def in_heads(x: ir.Value | None, count: int, width: int) -> ir.Value:
            return rewrite.op("Reshape", [x, rewrite.integers(0, 0, count, width)])[0]

        def filled(parts: list[ir.Value], width: int) -> ir.Value:
            (joined,) = rewrite.op("Concat", parts, {"axis": -1}) if len(parts) > 1 else parts
            if width < size:
                (joined,) = rewrite.op("Pad", [joined, rewrite.integers(*[0] * 7, size - width)])
            return rewrite.op("Reshape", [joined, rewrite.integers(0, 0, heads * size)])[0]

        (expanded,) = rewrite.op(
            "Linear",
            [latent],
            {
                "weights": [text(node, "weight")],
                "in_features": integer(node, "rank"),
                "out_features": heads * (nope + value),
            },
            domain=DOMAIN,
        )
        key, values = rewrite.split(in_heads(expanded, heads, nope + value), nope, value)
        query_pass, query_rotary = rewrite.split(in_heads(query, heads, nope + rope), nope, rope)
        (shared,) = rewrite.op("Expand", [in_heads(rotary_key, 1, rope), rewrite.integers(1, 1, heads, 1)])
        attended, present_key, present_value = rewrite.op(
            "Attention",
            [
                filled([query_rotary, query_pass], nope + rope),
                filled([shared, key], nope + rope),
                filled([values], value),
                past_key,
                past_value,
                mask,
            ],
            {
                "heads": heads,
                "kv_heads": heads,
                "head_dim": size,
                "scale": number(node, "scale"),
                "rotary_dimensions": rope,
                "interleaved": integer(node, "interleaved"),
            },
            domain=DOMAIN,
            outputs=3,
        )
        if value < size:
            (cut,) = rewrite.op(
                "Slice",
                [
                    in_heads(attended, heads, size),
                    rewrite.integers(0),
                    rewrite.integers(value),
                    rewrite.integers(-1),
                ],
            )
            (attended,) = rewrite.op("Reshape", [cut, rewrite.integers(0, 0, heads * value)])
        rewrite.finish(attended, present_key, present_value)


class LowerLatentAttentionPass(ir.passes.InPlacePass):
    """A pass by which LatentAttention becomes products with the cache (MLA absorbed, arXiv 2405.04434, 2.1.2).

    With key rows U_h and value rows V_h of ``weight`` for head h, q . (U c) = (U^T q) . c and sum p V c = V sum p c:

    1. Queries are taken into the latent's space, so that one cached vector is key and value of all heads.
    2. All heads are rows of one matrix product with the cache. What the rotary key adds to the weighted sum is cut off.
    3. ``weight`` becomes numbers when the graph is loaded: MatMulNBits has groups along the dimension that is
       contracted, and U contracts the other one.
    """

    def __init__(self, weights: Weights, rotary_tables: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.rotary_tables = rotary_tables

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every LatentAttention."""
        modified = False
        for node in nodes_of(model, "LatentAttention"):
            modified = True
            self._lower(model, node)
        return ir.passes.PassResult(model, modified)

    def _lower(self, model: ir.Model, node: ir.Node) -> None:
        positions = shared_positions(model, node)
        tables = rotary_caches(model, self.rotary_tables)
        rewrite = Rewrite(model, node)
        heads, nope, rope, rank = (integer(node, name) for name in ("heads", "nope", "rope", "rank"))
        interleaved = integer(node, "interleaved")
        query, latent, rotary_key, past, _mask, *selection = node.inputs

        keys, values = self._halves(rewrite)
        (query,) = rewrite.op("Reshape", [query, rewrite.integers(0, 0, heads, nope + rope)])
        (query,) = rewrite.op("Transpose", [query], {"perm": [0, 2, 1, 3]})
        query_pass, query_rotary = rewrite.split(query, nope, rope)
        (absorbed,) = rewrite.op("MatMul", [query_pass, keys])
        turned = rotate(rewrite, query_rotary, positions, tables, interleaved)
        (query,) = rewrite.op("Concat", [absorbed, turned], {"axis": -1})
        (query,) = rewrite.op("Mul", [query, rewrite.constant(f"{node.name}/scale", _scalar(number(node, "scale")))])

        key = rotate(rewrite, rotary_key, positions, tables, interleaved)
        (new,) = rewrite.op("Concat", [latent, key], {"axis": -1})
        cache = write_to_cache(rewrite, past, positions, new)
        scores, row = scores_of(rewrite, query, cache, rank + rope)
        visible = selection[0] if selection else positions.causal
        (bias,) = rewrite.op("Unsqueeze", [visible, rewrite.integers(1)])
        (scores,) = rewrite.op("Add", [scores, bias])
        (shares,) = rewrite.op("Softmax", [scores], {"axis": -1})
        (capacity,) = rewrite.op("Shape", [cache], {"start": 1, "end": 2})
        (flat,) = rewrite.op("Concat", [rewrite.integers(0, -1), capacity], {"axis": 0})
        (shares,) = rewrite.op("Reshape", [shares, flat])
        (mixed,) = rewrite.op("MatMul", [shares, cache])
        (mixed,) = rewrite.op("Reshape", [mixed, row])
        mixed, _ = rewrite.split(mixed, rank, rope)
        (attended,) = rewrite.op("MatMul", [mixed, values])
        (attended,) = rewrite.op("Transpose", [attended], {"perm": [0, 2, 1, 3]})
        (attended,) = rewrite.op("Reshape", [attended, rewrite.integers(0, 0, -1)])
        rewrite.finish(attended, cache)

    def _halves(self, rewrite: Rewrite) -> tuple[ir.Value, ir.Value]:
        """U [heads, nope, rank], and V transposed [heads, rank, value]."""
        node = rewrite.node
        key, rank = text(node, "weight"), integer(node, "rank")
        heads, nope, value = (integer(node, name) for name in ("heads", "nope", "value"))
        matrix = constant_matrix(rewrite, self.weights, key)
        (matrix,) = rewrite.op("Reshape", [matrix, rewrite.integers(heads, nope + value, rank)])
        keys, values = rewrite.split(matrix, nope, value, axis=1)
        return keys, rewrite.op("Transpose", [values], {"perm": [0, 2, 1]})[0]


def _scalar(value: float) -> np.ndarray[tuple[()], np.dtype[np.float32]]:
    return np.array(value, np.float32)
