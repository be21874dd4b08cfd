"""The places of a graph's quantized matrices, recovered from operators and names where the manifest lacks them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from glmexport.bundle.records import StoredTensor
from glmexport.foundation.recipe import Format


def tensors_before_they_were_noted(
    graph: ir.Graph, shapes: Mapping[str, tuple[int, ...]], hidden_size: int
) -> tuple[StoredTensor, ...]:
    """Return the tensors that a newer manifest of the same bundle would note.

    Args:
        graph: of the bundle, as the glmexport of then lowered it.
        shapes: of the tensors that may be in it, by checkpoint key.
        hidden_size: the model's, which is the length of an embedding's rows.
    """
    # One entry for all nodes that read the same codes.
    found = {codes: (bits, size, columns) for codes, bits, size, columns in _read_by_nodes(graph, hidden_size)}
    # The matrix of a product comes after the table that rows are looked up in.
    ordered = sorted(found.items(), key=lambda item: item[0].endswith(".q"))
    return tuple(
        _tensor(graph, codes, bits, size, columns=columns)
        for codes, (bits, size, columns) in ordered
        if all(key in shapes for key in stacked_keys(codes.removesuffix(".q").removesuffix(".codes")))
    )


def _read_by_nodes(graph: ir.Graph, hidden_size: int) -> Iterator[tuple[str, int, int, bool]]:
    """Yield the codes that a node reads, their bits and group size, and whether they lie in columns."""
    initializers = graph.initializers
    for node in graph.all_nodes():
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            codes = _name(node, 0 if node.op_type == "GatherBlockQuantized" else 1)
            yield codes, node.attributes["bits"].as_int(), node.attributes["block_size"].as_int(), False
        elif node.op_type == "DequantizeLinear":
            dtype = initializers[_name(node, 0)].dtype
            assert dtype is not None
            yield _name(node, 0), int(8 * dtype.itemsize), node.attributes["block_size"].as_int(), True
        elif node.op_type == "Gather" and _name(node, 0).endswith(".codes"):
            # These are rows of an embedding, which its groups fill.
            codes = _name(node, 0)
            groups = _last(graph, f"{codes.removesuffix('.codes')}.scales")
            yield codes, _last(graph, codes) * 8 // hidden_size, hidden_size // groups, False
        elif node.op_type in ("BitwiseAnd", "Cast") and _name(node, 0).endswith(".codes"):
            # These are dequantized by operators on constants.
            bits = 8
            if node.op_type == "BitwiseAnd":
                mask = initializers[_name(node, 1)].const_value
                assert mask is not None
                bits = int(mask.numpy()).bit_length()
            yield _name(node, 0), bits, _last(graph, _name(node, 0)) * 8 // bits, False


def _tensor(graph: ir.Graph, codes: str, bits: int, group_size: int, *, columns: bool) -> StoredTensor:
    name = codes.removesuffix(".q").removesuffix(".codes")
    # An embedding that is the lm_head as well has scales and zero points of that name, the other way round.
    beside = codes if columns and f"{codes}.scales" in graph.initializers else name
    parts = {"codes": codes, "scales": f"{beside}.scales"}
    symmetric = f"{beside}.zero_points" not in graph.initializers
    if not symmetric:
        parts["zero_points"] = f"{beside}.zero_points"
    form = Format.model_validate({"bits": bits, "group_size": group_size, "symmetric": symmetric})
    layout = "columns" if columns else "packed"
    values = {"matrices": tuple(stacked_keys(name)), "format": form, "parts": parts, "layout": layout}
    return StoredTensor.model_validate(values)


def stacked_keys(name: str) -> list[str]:
    """Return the checkpoint keys of stacked tensors by their one name: ``...self_attn.q_proj+k_proj+v_proj.weight``."""
    path, _, kind = name.rpartition(".")
    prefix, dot, stacked = path.rpartition(".")
    return [f"{prefix}{dot}{part}.{kind}" for part in stacked.split("+")]


def _last(graph: ir.Graph, name: str) -> int:
    shape = graph.initializers[name].shape
    assert shape is not None
    return int(shape.numpy()[-1])


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index]
    assert value is not None and value.name is not None
    return value.name
