"""Small graphs lowered for targets with some capabilities exchanged, and sessions over them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from glmexport.assembly.external import write_graphs
from glmexport.assembly.graph_files import load_graph
from glmexport.assembly.read import BundleWeights
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.engine.caches import CACHE_TYPES
from glmexport.formats.nearest import round_to_nearest
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Format
from glmexport.foundation.target import Target, open_target
from glmexport.graph.build import build_graph
from glmexport.lowering.pipeline import lower
from glmexport.lowering.stored import stored_tensors
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.weights import Weights
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference

CPU = "CPUExecutionProvider"


def changed(name: str = "x86-avx2", **sections: Mapping[str, Any]) -> Target:
    """A shipped target with other values, by section; checked as a file of the user's is."""
    values = open_target(name).model_dump()
    for section, keys in sections.items():
        values[section] |= keys
    return Target.model_validate(values)


#: What the other forms are compared with.
EXACT = changed(weights={"accuracy_level": 0})


def weights_of(path: Path, work: Path, form: Format | None) -> Weights:
    """The checkpoint's weights; with a format, its linears and embedding rounded to nearest in it."""
    checkpoint = Checkpoint.open(path)
    architecture = describe(checkpoint)
    checkpoint = architecture.presented(checkpoint)
    if form is None:
        return Weights(checkpoint, architecture, None, [])
    directory = WorkDirectory(work, {})
    routers = {layer.mlp.router.weight for layer in architecture.layers if hasattr(layer.mlp, "router")}
    keys = [linear.weight for _, linear in architecture.linears if linear.weight not in routers]
    solved = {key: round_to_nearest(checkpoint.read(key), form) for key in [*keys, architecture.embedding]}
    directory.commit("step", solved, {})
    return Weights(checkpoint, architecture, directory, ["step"])


def export(weights: Weights, target: Target, out: Path, limit: int | None = None) -> Path:
    """Both graphs of a bundle for ``target`` in ``out``."""
    exported(weights, target, out, limit)
    return out


def exported(weights: Weights, target: Target, out: Path, limit: int | None = None) -> BundleWeights:
    """The same, and the weights in what was written, where the passes noted that they are."""
    architecture = weights.architecture
    tables = Reference(weights.checkpoint, architecture).rotary_tables(architecture.context_length)
    graphs = {
        name: lower(build_graph(architecture, target.graph, every_position=every), target, weights, tables)
        for name, every in (("model.onnx", False), ("scoring.onnx", True))
    }
    tensors = stored_tensors(graphs["scoring.onnx"])
    write_graphs(graphs, out, Silent(), limit)
    return BundleWeights(load_graph(out, "scoring.onnx"), tensors, architecture.shapes())


class Session:
    """A graph of a bundle on the CPU, called as a decode loop calls it: ids and caches in, logits and caches out."""

    def __init__(self, path: Path, *, optimized: bool = True, capacity: int = 40) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # Where ONNX Runtime makes MatMulNBits of DequantizeLinear and MatMul, in the same arithmetic.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(path, options, providers=[CPU])
        self.caches = [entry for entry in self.session.get_inputs() if entry.name.startswith("past")]
        self.outputs = [
            "logits", *(value.name for value in self.session.get_outputs() if value.name.startswith("present"))
        ]  # fmt: skip
        self.capacity = capacity

    def __call__(
        self, ids: np.ndarray, past: list[np.ndarray] | None = None, length: int | None = None
    ) -> list[np.ndarray]:
        if past is None:
            sizes = {"batch": len(ids), "past_sequence": 0, "capacity": self.capacity}
            past = [
                np.zeros([sizes.get(size, size) for size in entry.shape], CACHE_TYPES[entry.type])
                for entry in self.caches
            ]
        inputs = {entry.name: value for entry, value in zip(self.caches, past, strict=True)}
        mask = np.ones((len(ids), length or ids.shape[1]), np.int64)
        return list(self.session.run(self.outputs, {"input_ids": ids, "attention_mask": mask, **inputs}))
