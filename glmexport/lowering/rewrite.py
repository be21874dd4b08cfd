"""The parts that passes are made of: new nodes in an old node's place, and weights that are produced when written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from glmexport.graph.operators import BLOCK

MICROSOFT = "com.microsoft"
#: Metadata of an initializer whose bytes another one stores.
SAME_BYTES = "glmexport.same_bytes_as"
#: Metadata of nodes and initializers that stay in fp32, whatever the activations are.
FLOAT32 = "glmexport.float32"

#: Values that several nodes of a graph share, for example the number of cached positions; by name.
SHARED_BLOCK = "embedding"


class Rewrite:
    """A collector of what replaces ``node``; names and block follow from the node's own.

    With ``float32`` what replaces it stays in fp32.
    """

    def __init__(self, model: ir.Model, node: ir.Node, *, float32: bool = False) -> None:
        self.model = model
        self.graph = model.graph
        #: The graph that the node is in: weights and constants are in the outermost one, wherever they are used.
        self.place = node.graph or model.graph
        self.node = node
        self.block = str(node.metadata_props[BLOCK])
        self.metadata = metadata(node) | ({FLOAT32: "1"} if float32 else {})
        self.nodes: list[ir.Node] = []

    def in_float32(self) -> Rewrite:
        """Return the same rewrite, for nodes among these that stay in fp32."""
        exact = copy(self)
        exact.metadata = self.metadata | {FLOAT32: "1"}
        return exact

    def op(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> tuple[ir.Value, ...]:
        """Add a node; returns its outputs."""
        name = f"{self.node.name}/{operator}_{len(self.nodes)}"
        values = [ir.Value(name=f"{name}.{index}") for index in range(outputs)]
        self.nodes.append(
            ir.Node(
                domain,
                operator,
                inputs,
                ir.convenience.convert_attributes(dict(attributes or {})),
                outputs=values,
                name=name,
                metadata_props=dict(self.metadata),
            )
        )
        return tuple(values)

    def weight(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        produce: Callable[[], NDArray[Any]],
        same_bytes_as: str | None = None,
    ) -> ir.Value:
        """Add an initializer of the node's block whose numbers are produced when they are written, not before.

        ``same_bytes_as`` names an initializer that may hold the same bytes in another shape; where the graph has
        it, the bytes are stored once.
        """
        value = weight(self.graph, name, dtype, shape, produce, self.block)
        if same_bytes_as in self.graph.initializers:
            value.metadata_props[SAME_BYTES] = str(same_bytes_as)
        return value

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Add a small initializer that stays in the graph file; one for all nodes that ask for the same name."""
        if name not in self.graph.initializers:
            value = ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                shape=ir.Shape(array.shape),
                const_value=ir.tensor(array, name=name),
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def integers(self, *values: int) -> ir.Value:
        """Add a constant vector of whole numbers, for shapes and axes."""
        return self.constant(f"integers_{'_'.join(map(str, values))}", np.array(values, np.int64))

    def split(self, x: ir.Value | None, *sizes: int, axis: int = -1) -> tuple[ir.Value, ...]:
        """Split ``x`` into parts of these sizes."""
        return self.op("Split", [x, self.integers(*sizes)], {"axis": axis}, outputs=len(sizes))

    def finish(self, *outputs: ir.Value | None, also: Sequence[ir.Node] = ()) -> None:
        """Put the new nodes in the node's place; ``outputs`` replace its outputs, in order (None: unused).

        ``also``: further nodes that the new ones make superfluous; their outputs must be replaced beforehand.
        """
        pairs = [(old, new) for old, new in zip(self.node.outputs, outputs, strict=True) if new is not None]
        ir.convenience.replace_nodes_and_values(
            self.place,
            self.node,
            [self.node, *also],
            self.nodes,
            [old for old, _ in pairs],
            [new for _, new in pairs],
        )


def metadata(node: ir.Node) -> dict[str, str]:
    """Return what nodes that come of ``node`` inherit: its block, and whether it stays in fp32."""
    return {name: value for name, value in node.metadata_props.items() if name in (BLOCK, FLOAT32)}


def weight(
    graph: ir.Graph,
    name: str,
    dtype: ir.DataType,
    shape: Sequence[int],
    produce: Callable[[], NDArray[Any]],
    block: str,
) -> ir.Value:
    """Return an initializer in the data file of ``block``, produced when it is written; one for each name."""
    if name in graph.initializers:
        found = graph.initializers[name]
        assert found.shape == ir.Shape(list(shape)), f"{name} is {found.shape} already, and not {list(shape)}"
        return found

    def tensor() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(produce()), dtype=dtype, name=name)

    value = ir.Value(
        name=name,
        type=ir.TensorType(dtype),
        shape=ir.Shape(list(shape)),
        const_value=ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(list(shape)), name=name),
    )
    value.metadata_props[BLOCK] = block
    graph.register_initializer(value)
    return value
