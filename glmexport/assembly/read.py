"""The quantized matrices of a bundle, by checkpoint key: what was shipped, not what was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import load_file
from torch import Tensor

from glmexport.architecture.description import Architecture
from glmexport.assembly.graph_files import load_graph
from glmexport.bundle.names import FOLDS, SCORING
from glmexport.checkpoint.fold import Fold, from_tensors
from glmexport.formats.packing import unpack
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format


def bundle_folds(directory: Path) -> dict[str, Fold]:
    """What has to be folded into the original's tensors to be the bundle's."""
    path = directory / FOLDS
    return from_tensors(load_file(path)) if path.is_file() else {}


@dataclass(frozen=True)
class _Stored:
    """Where a quantized matrix is: rows ``start`` to ``stop`` of initializers, and how they are packed.

    ``transposed``: codes are numbers [in, out] and scales [groups, out], as DequantizeLinear has them; the codes are
    signed where there are no zero points.
    """

    codes: str
    #: What the names of scales and zero points begin with.
    name: str
    bits: int
    group_size: int
    start: int
    stop: int
    transposed: bool = False


class BundleWeights:
    """Codes, scales and zero points of one of a bundle's graphs, read from its external data on demand.

    ``shapes``: those of the tensors that may be in it, by checkpoint key; by default of the model.
    """

    def __init__(
        self,
        directory: Path,
        architecture: Architecture,
        name: str = SCORING,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        graph = load_graph(directory, name)
        self._initializers = graph.initializers
        self._quantized: dict[str, _Stored] = {}
        self._shapes = architecture.shapes() if shapes is None else shapes
        for node in graph.all_nodes():
            if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
                gather = node.op_type == "GatherBlockQuantized"
                codes = _name(node, 0 if gather else 1)
                self._add(codes, node.attributes["bits"].as_int(), node.attributes["block_size"].as_int())
            elif node.op_type == "DequantizeLinear":
                dtype = self._initializers[_name(node, 0)].dtype
                assert dtype is not None
                bits, block = int(8 * dtype.itemsize), node.attributes["block_size"].as_int()
                self._add(_name(node, 0), bits, block, transposed=True)
            elif node.op_type == "Gather" and _name(node, 0).endswith(".codes"):
                # Rows of an embedding, which its groups fill.
                self._add(_name(node, 0), *self._embedding_form(architecture, _name(node, 0)))
            elif node.op_type in ("BitwiseAnd", "Cast") and _name(node, 0).endswith(".codes"):
                # Dequantized by operators of constants.
                bits = 8 if node.op_type == "Cast" else int(self._tensor(_name(node, 1))).bit_length()
                shape = self._initializers[_name(node, 0)].shape
                assert shape is not None
                self._add(_name(node, 0), bits, int(shape.numpy()[-1]) * 8 // bits)
        self._others = dict(self._stored_as_they_are())

    def _embedding_form(self, architecture: Architecture, codes: str) -> tuple[int, int]:
        """Bits and group size of the embedding whose packed rows are ``codes``."""
        size = architecture.hidden_size
        packed, groups = (self._initializers[name].shape for name in (codes, f"{codes.removesuffix('.codes')}.scales"))
        assert packed is not None and groups is not None
        return int(packed.numpy()[1]) * 8 // size, size // int(groups.numpy()[1])

    def _add(self, codes: str, bits: int, group_size: int, *, transposed: bool = False) -> None:
        """Note the matrices whose rows the initializer ``codes`` has."""
        name, start = codes.removesuffix(".q").removesuffix(".codes"), 0
        parts = codes if transposed and f"{codes}.scales" in self._initializers else name
        for key in _keys(name):
            stop = start + self._shapes[key][0]
            # A tied lm_head multiplies with the embedding: what both have is told of the product.
            if key not in self._quantized or codes.endswith(".q"):
                self._quantized[key] = _Stored(codes, parts, bits, group_size, start, stop, transposed)
            start = stop

    def _stored_as_they_are(self) -> Iterator[tuple[str, tuple[str, slice]]]:
        """Checkpoint key, and the initializer and rows in it; several tensors can be stacked in one."""
        shapes = self._shapes
        for name in self._initializers:
            keys = _keys(name)
            if all(key in shapes and key not in self._quantized for key in keys):
                start = 0
                for key in keys:
                    yield key, (name, slice(start, start + shapes[key][0]))
                    start += shapes[key][0]

    @property
    def quantized_keys(self) -> list[str]:
        """Checkpoint keys of the matrices that are stored quantized."""
        return list(self._quantized)

    @property
    def other_keys(self) -> list[str]:
        """Checkpoint keys of the tensors that are stored in full precision, as far as they are."""
        return list(self._others)

    def tensor(self, key: str) -> Tensor:
        """One of ``other_keys``."""
        name, rows = self._others[key]
        return self._tensor(name)[rows]

    def constant(self, name: str) -> Tensor | None:
        """An initializer that is not of the checkpoint; None if the graph has none of that name."""
        return self._tensor(name) if name in self._initializers else None

    def form(self, key: str) -> Format | None:
        """Format of the matrix with that checkpoint key; None if it is stored in full precision."""
        stored = self._quantized.get(key)
        if stored is None:
            return None
        symmetric = f"{stored.name}.zero_points" not in self._initializers
        values = {"bits": stored.bits, "group_size": stored.group_size, "symmetric": symmetric}
        return Format.model_validate(values)

    def quantized(self, key: str) -> QuantizedLinear | None:
        """The matrix with that checkpoint key; None if it is stored in full precision."""
        form = self.form(key)
        if form is None:
            return None
        stored = self._quantized[key]
        rows = slice(stored.start, stored.stop)
        if stored.transposed:
            return self._of_columns(form, stored, rows)
        scales = self._tensor(f"{stored.name}.scales")[rows]
        size = form.group_size * form.bits // 8
        codes = self._tensor(stored.codes)[rows].reshape(stored.stop - stored.start, scales.shape[1], size)
        zero_points = None if form.symmetric else self._tensor(f"{stored.name}.zero_points")[rows]
        # The width of the last group is padding where the matrix does not fill it.
        return unpack(form, self._shapes[key][1], codes, scales, zero_points)

    def _of_columns(self, form: Format, stored: _Stored, rows: slice) -> QuantizedLinear:
        codes, scales = (self._tensor(name)[:, rows].T.contiguous() for name in (stored.codes, f"{stored.name}.scales"))
        if form.symmetric:
            return QuantizedLinear(form, (codes.short() + 2 ** (form.bits - 1)).to(torch.uint8), scales, None)
        points = self._tensor(f"{stored.name}.zero_points")[:, rows].T.contiguous()
        return QuantizedLinear(form, codes, scales, points)

    def dequantized(self, key: str) -> Tensor | None:
        """The matrix that the runtime computes with, fp32; None if it is stored in full precision."""
        linear = self.quantized(key)
        return None if linear is None else linear.dequantize()

    def _tensor(self, name: str) -> Tensor:
        value = self._initializers[name].const_value
        assert value is not None
        array, dtype = value.numpy(), value.dtype
        # Types that numpy has from another library, and torch does not take from it.
        if dtype is ir.DataType.BFLOAT16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        if dtype in (ir.DataType.INT4, ir.DataType.UINT4):
            return torch.from_numpy(array.astype(np.int8 if dtype is ir.DataType.INT4 else np.uint8))
        return torch.from_numpy(array.copy())


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index]
    assert value is not None and value.name is not None
    return value.name


def _keys(name: str) -> list[str]:
    """The inverse of the name of stacked tensors."""
    path, _, kind = name.rpartition(".")
    prefix, dot, stacked = path.rpartition(".")
    return [f"{prefix}{dot}{part}.{kind}" for part in stacked.split("+")]
