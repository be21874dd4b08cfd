"""The placement of nodes by onnxruntime-web, from what it prints when a session is opened: it has no profile."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import onnx

from glmexport.engine.placement import Node

#: The messages of VerifyEachNodeIsAssignedToAnEp in core/framework/session_state.cc.
_ALL = re.compile(r"All nodes placed on \[(\w+)\]")
_SOME = re.compile(r"Node\(s\) placed on \[(\w+)\]")
_NODE = re.compile(r"\]   (\S+) \((.*)\)$")
_INTEGERS = frozenset(onnx.TensorProto.DataType.Value(name) for name in ("INT64", "INT32", "UINT64", "UINT32", "BOOL"))
#: The same limits as in ``placement``: elements of a small tensor, and tokens of the prompt for which sizes are
#: inferred.
_SMALL, _PROMPT = 100, 8


def placed_nodes(lines: Iterable[str], graph: Path) -> tuple[Node, ...] | None:
    """Return every node that is named in ``lines``; None: no placement is.

    ``graph`` is the file that the session was opened on.
    """
    model = onnx.load(graph, load_external_data=False)
    small = _small_nodes(model)
    provider, found = "", []
    for line in lines:
        if everywhere := _ALL.search(line):
            # The nodes are not named in this case.
            found = [(node.name, node.op_type, everywhere[1]) for node in model.graph.node]
        elif some := _SOME.search(line):
            provider = some[1]
        elif provider and (node := _NODE.search(line)):
            found.append((node[2], node[1], provider))
    nodes = tuple(Node(name=name, operator=kind, provider=at, small=name in small) for name, kind, at in found)
    return nodes or None


def _small_nodes(model: onnx.ModelProto) -> frozenset[str]:
    """Return the names of nodes that read and write only a few integers, as far as shapes can be inferred."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    sizes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        count = math.prod(size.dim_value if size.HasField("dim_value") else _PROMPT for size in tensor.shape.dim)
        sizes[value.name] = count if tensor.elem_type in _INTEGERS and tensor.HasField("shape") else math.inf
    for constant in graph.initializer:
        sizes[constant.name] = math.prod(constant.dims) if constant.data_type in _INTEGERS else math.inf
    return frozenset(
        node.name
        for node in graph.node
        # Shape and Size read only the shape of their input.
        if all(
            sizes.get(name, math.inf) <= _SMALL
            for name in (*(() if node.op_type in ("Shape", "Size") else filter(None, node.input)), *node.output)
        )
    )
