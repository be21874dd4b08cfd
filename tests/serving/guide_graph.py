"""Writes the graph that answers held to a grammar are chosen with: python tests/serving/guide_graph.py."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

import glmexport.serving.guides
from glmexport.serving.guides import PLACEHOLDER

PATH = Path(glmexport.serving.guides.__file__).with_name("guide.onnx")


def guide_graph(vocabulary: bytes) -> onnx.ModelProto:
    """Return a model without weights: logits [batch, length, vocabulary] of nought. ``vocabulary``: int64, 8 bytes."""
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["size"]),
        helper.make_node("Concat", ["size", "vocabulary"], ["shape"], axis=0),
        helper.make_node(
            "ConstantOfShape", ["shape"], ["logits"], value=helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "guide",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", "width"])],
        [helper.make_tensor("vocabulary", TensorProto.INT64, [1], vocabulary, raw=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


if __name__ == "__main__":
    PATH.write_bytes(guide_graph(PLACEHOLDER).SerializeToString())
