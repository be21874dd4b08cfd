"""Graphs are written to disk: weights go into one data file a block, shared by all graphs of the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from glmexport.bundle.names import WEIGHTS
from glmexport.foundation.progress import Progress
from glmexport.graph.operators import BLOCK
from glmexport.lowering.rewrite import SAME_BYTES

#: Alignment in bytes of a tensor in its file, so that it can be mapped.
_ALIGNMENT = 4096


def write_graphs(
    graphs: Mapping[str, ir.Model], directory: Path, progress: Progress, max_file_bytes: int | None = None
) -> None:
    """Write each graph under its file name, and the weights that they share once.

    One tensor is in memory at a time. A block that would exceed ``max_file_bytes`` goes into several files; a single
    tensor that does has its own file. The same graphs give the same bytes.
    """
    stored: dict[str, ir.ExternalTensor] = {}
    (directory / WEIGHTS).mkdir(parents=True, exist_ok=True)
    blocks = _lazy_by_block(graphs)
    with progress.track("Writing weights", len(blocks)) as track:
        for block, values in sorted(blocks.items()):
            for index, names in enumerate(_files(values, max_file_bytes)):
                tensors = [_tensor(values[name]) for name in names]
                file = f"{WEIGHTS}/{block}.data" if index == 0 else f"{WEIGHTS}/{block}.{index}.data"
                external = ir.external_data.convert_tensors_to_external(tensors, directory, file, alignment=_ALIGNMENT)
                stored |= dict(zip(names, external, strict=True))
            track.advance(1, block)
    for file_name, model in graphs.items():
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.LazyTensor):
                value.const_value = stored.get(name) or _aliased(value, stored)
            value.metadata_props.clear()
        for node in model.graph.all_nodes():
            node.metadata_props.clear()
        ir.save(model, directory / file_name)


def _lazy_by_block(graphs: Mapping[str, ir.Model]) -> dict[str, dict[str, ir.Value]]:
    """Return every initializer that is still to be produced and has bytes of its own, by block and name."""
    blocks: dict[str, dict[str, ir.Value]] = {}
    for model in graphs.values():
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.LazyTensor) and SAME_BYTES not in value.metadata_props:
                blocks.setdefault(str(value.metadata_props[BLOCK]), {})[name] = value
    return blocks


def _files(values: Mapping[str, ir.Value], limit: int | None) -> list[list[str]]:
    """Yield the names of ``values`` in order, in parts whose tensors fit into a file of ``limit`` bytes."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in sorted(values):
        added = -(-_tensor(values[name]).nbytes // _ALIGNMENT) * _ALIGNMENT
        if limit is not None and parts[-1] and size + added > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += added
    return parts


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _aliased(value: ir.Value, stored: Mapping[str, ir.ExternalTensor]) -> ir.ExternalTensor:
    """Return a tensor over bytes that another initializer stores, in this one's shape."""
    original = stored[str(value.metadata_props[SAME_BYTES])]
    assert value.dtype is not None and isinstance(value.shape, ir.Shape) and value.name is not None
    return ir.ExternalTensor(
        original.location,
        original.offset,
        original.length,
        value.dtype,
        shape=value.shape,
        name=value.name,
        base_dir=original.base_dir,
    )
