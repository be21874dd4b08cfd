"""Attention over caches of a fixed capacity, in standard operators whose shapes are all numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from glmexport.graph.operators import integer, nodes_of, number
from glmexport.lowering.attention import rotary_caches, shared_values
from glmexport.lowering.rewrite import Rewrite

_PLACES, _BIAS, _COSINES, _SINES = "cache_places", "causal_bias", "cosines", "sines"
#: The number that is added to the score of a position that a token does not see: softmax makes nothing of it in fp32,
#: and a compiler for fp16 has a number for it, as it may not have for infinity.
UNSEEN = -30000.0


class LowerFixedAttentionPass(ir.passes.InPlacePass):
    """A pass by which Attention of fixed shapes becomes products with whole caches, later positions unseen.

    1. New keys and values are scattered into the caches at their positions before anything is read of these.
    2. The query heads that share a key head are rows of one matrix product with it.
    3. Scores and their softmax are in fp32 whatever the activations are.
    4. Rotated pairs stay apart, the first of all and then the second of all: the heads of queries and keys are
       rearranged alike, and a product of the two does not depend on the order.
    """

    def __init__(self, rotary_tables: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.rotary_tables = rotary_tables

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every Attention."""
        nodes = list(nodes_of(model, "Attention"))
        for node in nodes:
            self._lower(model, node)
        return ir.passes.PassResult(model, bool(nodes))

    def _lower(self, model: ir.Model, node: ir.Node) -> None:
        positions = self._positions(model, node)
        rewrite = Rewrite(model, node)
        heads, kv_heads, size = (integer(node, name) for name in ("heads", "kv_heads", "head_dim"))
        *projected, past_key, past_value, _ = node.inputs
        if len(projected) == 1:
            projected = list(rewrite.split(projected[0], heads * size, kv_heads * size, kv_heads * size))
        query, key, value = projected
        query = self._rotated(rewrite, query, heads, positions)
        key = self._rotated(rewrite, key, kv_heads, positions)
        (key,) = rewrite.op("Reshape", [key, rewrite.integers(0, 0, -1)])
        keys, values = (
            rewrite.op("ScatterND", [cache, positions.places, new])[0]
            for cache, new in ((past_key, key), (past_value, value))
        )

        scale = rewrite.constant(f"{node.name}/scale", np.array(number(node, "scale"), np.float32))
        (query,) = rewrite.op("Mul", [query, scale])
        (query,) = rewrite.op("Transpose", [query], {"perm": [0, 2, 1, 3]})
        (query,) = rewrite.op("Reshape", [query, rewrite.integers(1, kv_heads, -1, size)])
        (scores,) = rewrite.op("MatMul", [query, _by_head(rewrite, keys, kv_heads, [0, 2, 3, 1])])
        shares = self._shares(rewrite, scores, heads, positions)
        (shares,) = rewrite.op("Reshape", [shares, rewrite.integers(1, kv_heads, -1, positions.capacity)])
        (mixed,) = rewrite.op("MatMul", [shares, _by_head(rewrite, values, kv_heads, [0, 2, 1, 3])])
        (mixed,) = rewrite.op("Reshape", [mixed, rewrite.integers(1, heads, -1, size)])
        (mixed,) = rewrite.op("Transpose", [mixed], {"perm": [0, 2, 1, 3]})
        rewrite.finish(rewrite.op("Reshape", [mixed, rewrite.integers(0, 0, -1)])[0], keys, values)

    @staticmethod
    def _shares(rewrite: Rewrite, scores: ir.Value, heads: int, positions: _Positions) -> ir.Value:
        """Return the share of every cached position in what a head attends to, [1, heads, S, C]."""
        (scores,) = rewrite.op("Reshape", [scores, rewrite.integers(1, heads, -1, positions.capacity)])
        exact = rewrite.in_float32()
        (scores,) = exact.op("Add", [scores, positions.bias])
        (shares,) = exact.op("Softmax", [scores], {"axis": -1})
        shares.type = ir.TensorType(ir.DataType.FLOAT)
        return shares

    @staticmethod
    def _rotated(rewrite: Rewrite, x: ir.Value | None, heads: int, positions: _Positions) -> ir.Value:
        """``x`` [1, S, heads * size] as [1, S, heads, size], its first dimensions rotated."""
        node = rewrite.node
        size, rotary = integer(node, "head_dim"), integer(node, "rotary_dimensions")
        (x,) = rewrite.op("Reshape", [x, rewrite.integers(0, 0, heads, size)])
        rest: list[ir.Value] = []
        if rotary < size:
            x, *rest = rewrite.split(x, rotary, size - rotary)
        if integer(node, "interleaved"):
            first, second = (
                rewrite.op("Slice", [x, *(rewrite.integers(n) for n in (start, rotary, 3, 2))])[0] for start in (0, 1)
            )
        else:
            first, second = rewrite.split(x, rotary // 2, rotary // 2)

        def turned(a: ir.Value, b: ir.Value, combine: str) -> ir.Value:
            products = [rewrite.op("Mul", pair)[0] for pair in ([a, positions.cosines], [b, positions.sines])]
            return rewrite.op(combine, products)[0]

        parts = [turned(first, second, "Sub"), turned(second, first, "Add"), *rest]
        return rewrite.op("Concat", parts, {"axis": -1})[0]

    def _positions(self, model: ir.Model, node: ir.Node) -> _Positions:
        """Return the positions of the new tokens, computed once a graph, when its first ``node`` needs them."""
        cache, position_ids = node.inputs[-2], node.inputs[-1]
        assert cache is not None and cache.shape is not None and position_ids is not None
        capacity = int(cache.shape.numpy()[1])
        found = shared_values(model)
        if _BIAS in found:
            return _Positions(capacity, *(found[name] for name in (_PLACES, _BIAS, _COSINES, _SINES)))
        assert position_ids.shape is not None
        before_all = model.graph[0]
        rewrite = Rewrite(model, before_all)
        (apart,) = rewrite.op("Unsqueeze", [position_ids, rewrite.integers(2)])
        count = int(position_ids.shape.numpy()[1])
        sequence = rewrite.constant("sequence", np.zeros((1, count, 1), np.int64))
        (places,) = rewrite.op("Concat", [sequence, apart], {"axis": -1})
        tables: list[ir.Value] = []
        for table in rotary_caches(model, self.rotary_tables):
            (rows,) = rewrite.op("Gather", [table, position_ids], {"axis": 0})
            tables += rewrite.op("Unsqueeze", [rows, rewrite.integers(2)])
        exact = rewrite.in_float32()
        (apart,) = exact.op("Unsqueeze", [position_ids, rewrite.integers(1, 3)])
        cached = rewrite.constant("cached_positions", np.arange(capacity, dtype=np.int64))
        (seen,) = exact.op("LessOrEqual", [cached, apart])
        choices = [
            rewrite.constant(name, np.array(value, np.float32)) for name, value in (("seen", 0.0), ("unseen", UNSEEN))
        ]
        (bias,) = exact.op("Where", [seen, *choices])
        for value, name in ((places, _PLACES), (bias, _BIAS), (tables[0], _COSINES), (tables[1], _SINES)):
            value.name = name
        model.graph.insert_before(before_all, rewrite.nodes)
        return _Positions(capacity, places, bias, *tables)


@dataclass(frozen=True)
class _Positions:
    """Values that all layers of a graph share, of S new tokens and caches of C positions."""

    capacity: int
    #: The places in the cache, [1, S, 2] int64: sequence and position, as ScatterND takes them.
    places: ir.Value
    #: The mask [1, 1, S, C] fp32: 0 where a cached position is not behind the token's own.
    bias: ir.Value
    #: Cosines and sines, [1, S, 1, rotary dimensions / 2] each.
    cosines: ir.Value
    sines: ir.Value


def _by_head(rewrite: Rewrite, cache: ir.Value, heads: int, order: list[int]) -> ir.Value:
    """``cache`` [1, C, heads * size] as [1, C, heads, size], with these axes in ``order``."""
    (apart,) = rewrite.op("Reshape", [cache, rewrite.integers(0, 0, heads, -1)])
    return rewrite.op("Transpose", [apart], {"perm": order})[0]
