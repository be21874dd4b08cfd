"""The quantized matrices of a bundle, by checkpoint key: what was shipped, not what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import load_file
from torch import Tensor

from glmexport.architecture import Architecture
from glmexport.bundle.write import FOLDS, SCORING
from glmexport.checkpoint import Fold
from glmexport.checkpoint.fold import from_tensors
from glmexport.quantization import QuantizedLinear, unpack
from glmexport.recipe import Format


def bundle_folds(directory: Path) -> dict[str, Fold]:
    """What has to be folded into the original's tensors to be the bundle's."""
    path = directory / FOLDS
    return from_tensors(load_file(path)) if path.is_file() else {}


class BundleWeights:
    """Codes, scales and zero points of scoring.onnx, read from its external data on demand."""

    def __init__(self, directory: Path, architecture: Architecture) -> None:
        graph = ir.load(directory / SCORING).graph
        self._initializers = graph.initializers
        self._nodes: dict[str, tuple[ir.Node, int, int]] = {}
        sizes = {linear.weight: linear.out_features for _, linear in architecture.linears}
        for node in graph.all_nodes():
            if node.op_type == "MatMulNBits":
                start = 0
                for key in _keys(_name(node, 1).removesuffix(".q")):
                    self._nodes[key] = (node, start, start + sizes[key])
                    start += sizes[key]
            elif node.op_type == "GatherBlockQuantized":
                key = _name(node, 0).removesuffix(".codes")
                self._nodes.setdefault(key, (node, 0, architecture.vocabulary_size))
        self._others = dict(self._stored_as_they_are(architecture))

    def _stored_as_they_are(self, architecture: Architecture) -> Iterator[tuple[str, tuple[str, slice]]]:
        """Checkpoint key, and the initializer and rows in it; several tensors can be stacked in one."""
        shapes = architecture.shapes()
        for name in self._initializers:
            keys = _keys(name)
            if all(key in shapes and key not in self._nodes for key in keys):
                start = 0
                for key in keys:
                    yield key, (name, slice(start, start + shapes[key][0]))
                    start += shapes[key][0]

    @property
    def quantized_keys(self) -> list[str]:
        """Checkpoint keys of the matrices that are stored quantized."""
        return list(self._nodes)

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
        if key not in self._nodes:
            return None
        node = self._nodes[key][0]
        gather = node.op_type == "GatherBlockQuantized"
        name = _name(node, 0).removesuffix(".codes") if gather else _name(node, 1).removesuffix(".q")
        values = {
            "bits": node.attributes["bits"].as_int(),
            "group_size": node.attributes["block_size"].as_int(),
            "symmetric": f"{name}.zero_points" not in self._initializers,
        }
        return Format.model_validate(values)

    def quantized(self, key: str) -> QuantizedLinear | None:
        """The matrix with that checkpoint key; None if it is stored in full precision."""
        if key not in self._nodes:
            return None
        node, start, stop = self._nodes[key]
        gather = node.op_type == "GatherBlockQuantized"
        name = _name(node, 0).removesuffix(".codes") if gather else _name(node, 1).removesuffix(".q")
        form = self.form(key)
        assert form is not None
        bits, group_size = form.bits, form.group_size
        scales = self._tensor(f"{name}.scales")[start:stop]
        codes = self._tensor(_name(node, 0 if gather else 1))[start:stop].reshape(
            stop - start, scales.shape[1], group_size * bits // 8
        )
        zero_points = None if form.symmetric else self._tensor(f"{name}.zero_points")[start:stop]
        # The width of the last group is padding where the matrix does not fill it.
        width = node.attributes["K"].as_int() if not gather else scales.shape[1] * group_size
        return unpack(form, width, codes, scales, zero_points)

    def dequantized(self, key: str) -> Tensor | None:
        """The matrix that the runtime computes with, fp32; None if it is stored in full precision."""
        linear = self.quantized(key)
        return None if linear is None else linear.dequantize()

    def _tensor(self, name: str) -> Tensor:
        value = self._initializers[name].const_value
        assert value is not None
        return torch.from_numpy(value.numpy().copy())


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index]
    assert value is not None and value.name is not None
    return value.name


def _keys(name: str) -> list[str]:
    """The inverse of the name of stacked tensors."""
    path, _, kind = name.rpartition(".")
    prefix, dot, stacked = path.rpartition(".")
    return [f"{prefix}{dot}{part}.{kind}" for part in stacked.split("+")]
