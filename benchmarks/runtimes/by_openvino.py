"""OpenVINO on a model that optimum-intel has exported, its cache inside of the request, as OpenVINO GenAI runs it.

    python by_openvino.py MODEL CAPACITY THREADS VOCABULARY
    python by_openvino.py --describe MODEL          bytes of the blocks' matrices, and read for a token

Speaks the protocol of common.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import openvino
from common import Runtime, serve
from openvino import opset13


class OpenVino(Runtime):
    def __init__(self, model: Path, threads: int) -> None:
        core = openvino.Core()
        graph = core.read_model(model / "openvino_model.xml")
        last_position_only(graph)
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = core.compile_model(graph, "CPU", settings)
        self.request = compiled.create_infer_request()
        self.name = f"OpenVINO {openvino.__version__.split('-')[0]}"
        self.cached, self.best = 0, 0

    def start(self, ids: list[int]) -> None:
        self.request.reset_state()
        self.cached = 0
        self.extend(ids)

    def extend(self, ids: list[int]) -> None:
        total = self.cached + len(ids)
        result = self.request.infer(
            {
                "input_ids": np.array([ids], np.int64),
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(self.cached, total, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        self.cached = total
        self.best = int(result["logits"][0, -1].argmax())

    def step(self) -> None:
        self.extend([self.best])


def last_position_only(graph: openvino.Model) -> None:
    """Cut the lm_head's input to the last position, as OpenVINO GenAI does before it compiles a model."""
    node = graph.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    hidden = node.input(0)
    bounds = [opset13.constant([value], np.int64) for value in (-1, np.iinfo(np.int64).max, 1, 1)]
    hidden.replace_source_output(opset13.slice(hidden.get_source_output(), *bounds).output(0))
    graph.validate_nodes_and_infer_types()


def describe(model: Path) -> dict[str, int]:
    """Bytes of the blocks' matrices, and of all that a decoded token reads."""
    blocks = read = 0
    for node in openvino.Core().read_model(model / "openvino_model.xml").get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "Constant" and "embed" not in name:
            size = node.get_byte_size()
            read += size
            blocks += size if "layers." in name and "norm" not in name and "bias" not in name else 0
    return {"blocks": blocks, "read": read}


if __name__ == "__main__":
    if sys.argv[1] == "--describe":
        print(json.dumps(describe(Path(sys.argv[2]))))
        sys.exit()
    model, *numbers = sys.argv[1:]
    _, threads, vocabulary = map(int, numbers)
    serve(OpenVino, Path(model), threads, vocabulary=vocabulary)
