"""A quantized matrix as numbers: in every format exactly those that the quantizer decided on, folded at load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from models import write_checkpoint

from glmexport.assembly.external import write_graphs
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.formats.nearest import round_to_nearest
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Format
from glmexport.graph.operators import BLOCK
from glmexport.lowering.constant import constant_matrix
from glmexport.lowering.rewrite import Rewrite
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.weights import Weights
from glmexport.reference.describe import describe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    path = tmp_path_factory.mktemp("checkpoint")
    # Three and a half groups of 16: neither the groups nor the bytes of the zero points are filled.
    write_checkpoint(path, "glm4_moe_lite", num_hidden_layers=1, kv_lora_rank=56)
    return Checkpoint.open(path)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("bits", [2, 4, 8, None])
def test_it_is_the_matrix(
    checkpoint: Checkpoint, tmp_path: Path, bits: int | None, group_size: int, symmetric: bool
) -> None:
    architecture = describe(checkpoint)
    key = architecture.layers[0].attention.linears[3].weight
    original = checkpoint.read(key)
    expected, solved = original, {}
    if bits is not None:
        form = Format.model_validate({"bits": bits, "group_size": group_size, "symmetric": symmetric})
        solved[key] = round_to_nearest(original, form)
        expected = solved[key].dequantize()
    work = WorkDirectory(tmp_path / "work", {})
    work.commit("step", solved, {})
    weights = Weights(checkpoint, architecture, work, ["step"])

    one = ir.Value(name="one", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.Node("glmexport", "Matrix", [one], num_outputs=1, name="matrix", metadata_props={BLOCK: "block"})
    graph = ir.Graph([one], node.outputs, nodes=[node], opset_imports={"": 21}, name="matrix")
    model = ir.Model(graph, ir_version=10)
    rewrite = Rewrite(model, node)
    matrix = constant_matrix(rewrite, weights, key)
    rewrite.finish(*rewrite.op("Mul", [matrix, one]))
    graph.outputs[0].name, graph.outputs[0].dtype = "out", ir.DataType.FLOAT
    write_graphs({"model.onnx": model}, tmp_path / "bundle", Silent())

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    path = tmp_path / "bundle" / "model.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"one": np.ones(1, np.float32)})
    assert torch.equal(torch.from_numpy(found), expected)
    # Nothing of it is left to compute.
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    assert [left.op_type for left in optimized.graph.node] == ["Mul"]
