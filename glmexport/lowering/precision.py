"""Activations in the target's type: the last step before products and norms are the provider's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from glmexport.bundle.names import LOGITS, RECENT_LOGITS
from glmexport.foundation.errors import InputError
from glmexport.foundation.target import Target
from glmexport.lowering.rewrite import FLOAT32, metadata

ACTIVATIONS = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


class ActivationTypePass(ir.passes.InPlacePass):
    """A pass that turns every fp32 value into one of the target's type, but for what is marked ``FLOAT32``.

    1. Weights and constants are rounded when they are written. A finite one that the type cannot hold is an error.
    2. Scales are stored in fp16: where that is the type, the casts behind them disappear.
    3. What goes into a marked node is cast to fp32; what comes out as fp32, back. Routers are marked: nearly equal
       scores decide which experts are read. So are norms in standard arithmetic, whose squares fp16 cannot hold.
    4. Logits leave the graph in fp32, whatever they were computed in.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.dtype = ACTIVATIONS[target.graph.activations]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert the graph and those inside of it."""
        if self.dtype is ir.DataType.FLOAT:
            return ir.passes.PassResult(model, False)
        nodes = list(model.graph.all_nodes())
        marked = {node for node in nodes if FLOAT32 in node.metadata_props}
        self._initializers(model.graph, marked)
        for value in (*model.graph.inputs, *model.graph.outputs):
            self._convert(value)
        for node in nodes:
            if node in marked:
                self._into(node, marked)
            else:
                self._plain(node)
        for node in nodes:
            if node in marked:
                self._out_of(node, marked)
        for index, value in enumerate(model.graph.outputs):
            if value.name in (LOGITS, RECENT_LOGITS):
                self._in_float32(model.graph, index)
        return ir.passes.PassResult(model, True)

    def _convert(self, value: ir.Value) -> None:
        if value.dtype is ir.DataType.FLOAT:
            value.type = ir.TensorType(self.dtype)

    def _initializers(self, graph: ir.Graph, marked: set[ir.Node]) -> None:
        for value in graph.initializers.values():
            uses = {node in marked for node in value.consumers()}
            if value.dtype is not ir.DataType.FLOAT or FLOAT32 in value.metadata_props or uses == {True}:
                continue
            assert uses == {False}, f"{value.name} is read in two types"
            held = value.const_value
            assert held is not None
            if isinstance(held, ir.LazyTensor):
                # Read when it is written, as before.
                value.const_value = ir.LazyTensor(
                    self._rounding(held), dtype=self.dtype, shape=held.shape, name=held.name
                )
            else:
                value.const_value = self._rounding(held)()
            self._convert(value)

    def _rounding(self, held: ir.TensorProtocol) -> Callable[[], ir.TensorProtocol]:
        def rounded() -> ir.TensorProtocol:
            return ir.Tensor(as_type(held.numpy(), self.dtype, str(held.name)), dtype=self.dtype, name=held.name)

        return rounded

    def _plain(self, node: ir.Node) -> None:
        for value in node.outputs:
            self._convert(value)
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                for value in attribute.as_graph().outputs:
                    self._convert(value)
        if node.domain == "" and node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            source, cast = node.inputs[0], node.outputs[0]
            assert source is not None
            if source.dtype is self.dtype:
                ir.convenience.replace_all_uses_with(cast, source)
                assert node.graph is not None
                node.graph.remove(node, safe=True)
            else:
                node.attributes["to"] = ir.AttrInt64("to", int(self.dtype))

    def _into(self, node: ir.Node, marked: set[ir.Node]) -> None:
        for index, value in enumerate(node.inputs):
            producer = value.producer() if value is not None else None
            if value is None or value.is_initializer() or producer in marked or value.dtype is ir.DataType.INT64:
                continue
            cast = _cast(node, f"{node.name}/input_{index}", value, ir.DataType.FLOAT)
            assert node.graph is not None
            node.graph.insert_before(node, [cast])
            node.replace_input_with(index, cast.outputs[0])

    def _out_of(self, node: ir.Node, marked: set[ir.Node]) -> None:
        for position, value in enumerate(node.outputs):
            uses = [use for use in value.uses() if use.node not in marked]
            if value.dtype is not ir.DataType.FLOAT or not uses:
                continue
            cast = _cast(node, f"{node.name}/output_{position}", value, self.dtype)
            assert node.graph is not None
            node.graph.insert_after(node, [cast])
            for use in uses:
                use.node.replace_input_with(use.idx, cast.outputs[0])

    def _in_float32(self, graph: ir.Graph, index: int) -> None:
        computed = graph.outputs[index]
        node, name = computed.producer(), computed.name
        assert node is not None
        computed.name = f"{name}.{self.dtype.name.lower()}"
        cast = _cast(node, f"{node.name}/{name}", computed, ir.DataType.FLOAT)
        cast.outputs[0].name, cast.outputs[0].shape = name, computed.shape
        graph.append(cast)
        graph.outputs[index] = cast.outputs[0]


def as_type(array: NDArray[Any], dtype: ir.DataType, name: str) -> NDArray[Any]:
    """Return ``array`` in a floating-point type.

    Raises:
        InputError: a number is finite and no longer is.
    """
    with np.errstate(over="ignore"):
        rounded: NDArray[Any] = array.astype(dtype.numpy())
    lost = np.isfinite(array) & ~np.isfinite(rounded.astype(np.float32))
    if lost.any():
        largest = float(np.abs(array[lost]).max())
        raise InputError(
            f"{name} has {int(lost.sum())} numbers beyond what {dtype.name.lower()} holds, the largest {largest:.3g}.",
            next_step='Take a target with graph.activations = "bfloat16" or "float32".',
        )
    return rounded


def _cast(node: ir.Node, name: str, value: ir.Value, dtype: ir.DataType) -> ir.Node:
    output = ir.Value(name=f"{name}.0", type=ir.TensorType(dtype))
    attributes = ir.convenience.convert_attributes({"to": int(dtype)})
    return ir.Node("", "Cast", [value], attributes, outputs=[output], name=name, metadata_props=metadata(node))
