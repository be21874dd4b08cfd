"""The indexer of sparse attention: which cached tokens a token attends to."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from glmexport.graph.operators import integer, nodes_of, number, text
from glmexport.lowering.attention import rotary_caches
from glmexport.lowering.capacity import SEEN, Positions, rotate, scores_of, shared_positions, write_to_cache
from glmexport.lowering.rewrite import Rewrite
from glmexport.quantization.weights import Weights


class LowerIndexSelectionPass(ir.passes.InPlacePass):
    """A pass by which IndexSelection becomes products with cached index keys, TopK, and a scattered mask.

    1. Causality comes before the choice, so that nothing is spent on what a token does not see.
    2. Where a token sees fewer positions than it may choose, it chooses some that it does not see: the mask is
       causal again.
    """

    def __init__(self, weights: Weights, rotary_tables: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.rotary_tables = rotary_tables

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every IndexSelection."""
        modified = False
        for node in nodes_of(model, "IndexSelection"):
            modified = True
            self._lower(model, node)
        return ir.passes.PassResult(model, modified)

    def _lower(self, model: ir.Model, node: ir.Node) -> None:
        positions = shared_positions(model, node)
        rewrite = Rewrite(model, node)
        heads, size, top_k = (integer(node, name) for name in ("heads", "head_dim", "top_k"))
        query, key, head_weights, past, _mask = node.inputs
        (query,) = rewrite.op("Reshape", [query, rewrite.integers(0, 0, heads, size)])
        (query,) = rewrite.op("Transpose", [query], {"perm": [0, 2, 1, 3]})
        query = self._turned(rewrite, query, positions)
        norm = [self._vector(rewrite, f"{text(node, 'key_norm')}.{kind}") for kind in ("weight", "bias")]
        (key,) = rewrite.op("LayerNormalization", [key, *norm], {"axis": -1, "epsilon": number(node, "epsilon")})
        cache = write_to_cache(rewrite, past, positions, self._turned(rewrite, key, positions))

        def scaled(x: ir.Value | None, factor: float) -> ir.Value:
            return rewrite.op("Mul", [x, rewrite.constant(f"factor_{factor!r}", np.array(factor, np.float32))])[0]

        scores, _ = scores_of(rewrite, scaled(query, size**-0.5), cache, size)
        (scores,) = rewrite.op("Relu", [scores])
        (by_head,) = rewrite.op("Transpose", [scaled(head_weights, heads**-0.5)], {"perm": [0, 2, 1]})
        (by_head,) = rewrite.op("Unsqueeze", [by_head, rewrite.integers(3)])
        (scores,) = rewrite.op("Mul", [scores, by_head])
        (scores,) = rewrite.op("ReduceSum", [scores, rewrite.integers(1)], {"keepdims": 0})
        (scores,) = rewrite.op("Add", [scores, positions.causal])

        (capacity,) = rewrite.op("Shape", [cache], {"start": 1, "end": 2})
        (count,) = rewrite.op("Min", [rewrite.integers(top_k), capacity])
        _, chosen = rewrite.op("TopK", [scores, count], {"axis": -1, "sorted": 0}, outputs=2)
        seen, unseen = (rewrite.constant(name, np.array(value, np.float32)) for name, value in SEEN.items())
        (everywhere,) = rewrite.op("Shape", [scores])
        (nothing,) = rewrite.op("Expand", [unseen, everywhere])
        (places,) = rewrite.op("Shape", [chosen])
        (marks,) = rewrite.op("Expand", [seen, places])
        (selected,) = rewrite.op("ScatterElements", [nothing, chosen, marks], {"axis": -1})
        rewrite.finish(rewrite.op("Add", [selected, positions.causal])[0], cache)

    def _turned(self, rewrite: Rewrite, x: ir.Value, positions: Positions) -> ir.Value:
        """The first ``rope`` dimensions rotated, as pairs of neighbours."""
        rope, size = integer(rewrite.node, "rope"), integer(rewrite.node, "head_dim")
        tables = rotary_caches(rewrite.model, self.rotary_tables)
        if rope == size:
            return rotate(rewrite, x, positions, tables, 1)
        first, rest = rewrite.split(x, rope, size - rope)
        return rewrite.op("Concat", [rotate(rewrite, first, positions, tables, 1), rest], {"axis": -1})[0]

    def _vector(self, rewrite: Rewrite, key: str) -> ir.Value:
        return rewrite.weight(key, ir.DataType.FLOAT, self.weights.shape(key), partial(self._read, key))

    def _read(self, key: str) -> NDArray[Any]:
        return self.weights.tensor(key).numpy()
