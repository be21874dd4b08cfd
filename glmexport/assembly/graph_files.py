"""Graphs of bundles, read from their files."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from glmexport.bundle.links import cache_of


def load_graph(bundle: Path, name: str) -> ir.Graph:
    """Return a graph of a bundle, the tensors of which are read where the links to their files lead."""
    graph = ir.load(bundle / name).graph
    root = cache_of(bundle.resolve())
    if root is None:
        return graph
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                (bundle / tensor.location).resolve().relative_to(root),
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=str(tensor.name),
                base_dir=root,
            )
    return graph
