"""The quantized matrices of a bundle by checkpoint key, read from the shipped graph and not from its plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from glmexport.architecture.description import Architecture
from glmexport.assembly.graph_files import load_graph
from glmexport.assembly.unnoted import stacked_keys, tensors_before_they_were_noted
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.names import FOLDS, SCORING
from glmexport.bundle.records import StoredTensor
from glmexport.checkpoint.fold import Fold, from_tensors
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.errors import BundleError
from glmexport.foundation.recipe import Format


def bundle_folds(directory: Path) -> dict[str, Fold]:
    """Return the scales that have to be folded into the original's tensors to get the bundle's."""
    path = directory / FOLDS
    return from_tensors(load_file(path)) if path.is_file() else {}


class BundleWeights:
    """Codes, scales and zero points of one of a bundle's graphs, read from its external data on demand."""

    def __init__(self, graph: ir.Graph, tensors: Iterable[StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Look up the place of every matrix.

        Args:
            graph: loaded, its external data in place.
            tensors: where it holds quantized matrices.
            shapes: of the tensors that may be in it, by checkpoint key.

        Raises:
            BundleError: a tensor is not in the graph, or a node reads it in another format.
        """
        self._initializers = graph.initializers
        self._shapes = shapes
        self._quantized: dict[str, list[_Rows]] = {}
        for tensor in tensors:
            _refuse_other_use(graph, tensor, shapes)
            start = 0
            for key in tensor.matrices:
                stop = start + shapes[key][0]
                self._quantized.setdefault(key, []).append(_Rows(tensor, start, stop))
                start = stop
        self._others = dict(self._stored_as_they_are())

    @classmethod
    def open(cls, bundle: Bundle, architecture: Architecture) -> BundleWeights:
        """Open the weights of the model in ``bundle``; raises as ``BundleWeights`` does."""
        graph, shapes = load_graph(bundle.directory, SCORING), architecture.shapes()
        tensors = bundle.manifest.tensors
        if tensors is None:
            tensors = tensors_before_they_were_noted(graph, shapes, architecture.hidden_size)
        return cls(graph, tensors, shapes)

    @classmethod
    def open_draft(cls, bundle: Bundle, architecture: Architecture) -> BundleWeights:
        """Open the weights of the graph that drafts, the model's among them; raises as ``BundleWeights`` does."""
        draft = bundle.manifest.draft
        assert draft is not None and architecture.token_prediction is not None
        graph = load_graph(bundle.directory, draft.file)
        shapes = architecture.token_prediction.shapes() | architecture.shapes()
        tensors = draft.tensors
        if tensors is None:
            tensors = tensors_before_they_were_noted(graph, shapes, architecture.hidden_size)
        return cls(graph, tensors, shapes)

    def _stored_as_they_are(self) -> Iterator[tuple[str, tuple[str, slice]]]:
        """Return the initializer and its rows by checkpoint key; several tensors can be stacked in one."""
        shapes = self._shapes
        for name in self._initializers:
            keys = stacked_keys(name)
            if all(key in shapes and key not in self._quantized for key in keys):
                start = 0
                for key in keys:
                    yield key, (name, slice(start, start + shapes[key][0]))
                    start += shapes[key][0]

    @property
    def quantized_keys(self) -> list[str]:
        """The checkpoint keys of the matrices that are stored quantized."""
        return list(self._quantized)

    @property
    def other_keys(self) -> list[str]:
        """The checkpoint keys of the tensors that are stored in full precision."""
        return list(self._others)

    def tensor(self, key: str) -> Tensor:
        """Return the tensor with that checkpoint key, one of ``other_keys``."""
        name, rows = self._others[key]
        return self._tensor(name)[rows]

    def constant(self, name: str) -> Tensor | None:
        """Return an initializer that is not of the checkpoint; None if the graph has none of that name."""
        return self._tensor(name) if name in self._initializers else None

    def form(self, key: str) -> Format | None:
        """Return the format of the matrix with that checkpoint key; None if it is stored in full precision."""
        rows = self._quantized.get(key)
        return None if rows is None else rows[-1].tensor.format

    def quantized(self, key: str) -> QuantizedLinear | None:
        """Return the matrix with that checkpoint key; None if it is stored in full precision.

        For one table that is embedding and lm_head, it is the matrix of the product.
        """
        rows = self._quantized.get(key)
        return None if rows is None else self._read(rows[-1], self._shapes[key][1])

    def every(self, key: str) -> list[QuantizedLinear]:
        """Return the matrix as often as it is stored: one table that is embedding and lm_head can lie there twice."""
        return [self._read(rows, self._shapes[key][1]) for rows in self._quantized[key]]

    def _read(self, rows: _Rows, columns: int) -> QuantizedLinear:
        form, parts, span = rows.tensor.format, rows.tensor.parts, slice(rows.start, rows.stop)
        if rows.tensor.layout == "packed":
            whole = sum(self._shapes[key][0] for key in rows.tensor.matrices)
            packed: dict[str, Tensor] = {}
            for part, name in parts.items():
                packed[part] = self._tensor(name).reshape(whole, -1)[span]
            # The width of the last group is padding where the matrix does not fill it.
            return QuantizedLinear.unpack(form, packed, columns)
        numbers = {part: self._tensor(name)[:, span].T.contiguous() for part, name in parts.items()}
        codes, scales, points = numbers["codes"], numbers["scales"], numbers.get("zero_points")
        if points is None:
            codes = (codes.short() + 2 ** (form.bits - 1)).to(torch.uint8)
        return QuantizedLinear(form, codes, scales, points)

    def dequantized(self, key: str) -> Tensor | None:
        """Return the matrix that the runtime computes with, fp32; None if it is stored in full precision."""
        linear = self.quantized(key)
        return None if linear is None else linear.dequantize()

    def _tensor(self, name: str) -> Tensor:
        value = self._initializers[name].const_value
        assert value is not None
        tensor = _copied(value.numpy(), value.dtype)
        if isinstance(value, ir.ExternalTensor):
            # It would keep a mapping of its whole file with an open descriptor, and what it took apart of 4-bit codes.
            value.release()
        return tensor


def _copied(array: NDArray[Any], dtype: ir.DataType) -> Tensor:
    """Return the numbers of an array of that type in memory of their own."""
    # numpy has these types from another library, and torch does not accept them.
    if dtype is ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        return torch.from_numpy(array.astype(np.int8 if dtype is ir.DataType.INT4 else np.uint8))
    return torch.from_numpy(array.copy())


@dataclass(frozen=True)
class _Rows:
    """Rows ``start`` to ``stop`` of stored tensors."""

    tensor: StoredTensor
    start: int
    stop: int


def _refuse_other_use(graph: ir.Graph, tensor: StoredTensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that model and graph have what is noted, and that no node takes the codes for those of another format."""
    for key in tensor.matrices:
        if len(shapes.get(key, ())) != 2:
            raise BundleError(
                f"bundle.json says where {key} is stored, and the model has no such matrix.",
                next_step="Build the bundle again.",
            )
    for name in tensor.parts.values():
        if name not in graph.initializers:
            raise BundleError(
                f"bundle.json says that {tensor.matrices[0]} is stored in {name}, and the graph has no such tensor.",
                next_step="Build the bundle again.",
            )
    expected = {"bits": tensor.format.bits, "block_size": tensor.format.group_size}
    for node in graph.initializers[tensor.parts["codes"]].consumers():
        for name, value in expected.items():
            if name in node.attributes and node.attributes[name].as_int() != value:
                raise BundleError(
                    f"bundle.json says that {tensor.matrices[0]} is stored as {tensor.format.label}, and {node.name} "
                    f"reads it with {name} {node.attributes[name].as_int()}.",
                    next_step="Build the bundle again.",
                )
