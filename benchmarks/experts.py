"""Routed experts on ONNX Runtime: an If an expert, as bundles have it, against the one operator QMoE.

    python -m benchmarks.experts [--threads N] [--output FILE]

Both compute the same from the same 4-bit codes (symmetric, groups of 32): checked, and then timed in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from glmexport.foundation import machine
from glmexport.graph.operators import BLOCK, DOMAIN
from glmexport.lowering.experts import LowerExpertsPass
from glmexport.lowering.mlp import LowerGatedActivationPass
from glmexport.lowering.rewrite import MICROSOFT, Rewrite

HIDDEN, INNER, EXPERTS, CHOSEN, GROUP = 2048, 768, 128, 8, 32
#: By positions.
ROUNDS = {1: 100, 128: 20}

Codes = dict[str, tuple[NDArray[np.uint8], NDArray[np.float32]]]


def random_codes(rng: np.random.Generator) -> Codes:
    """Packed codes [E, N, K / 2] and scales [E, N, K / GROUP] of both matrices of all experts."""

    def matrix(rows: int, columns: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        codes = rng.integers(0, 256, (EXPERTS, rows, columns // 2), dtype=np.uint8)
        return codes, (rng.random((EXPERTS, rows, columns // GROUP)) * 0.01).astype(np.float32)

    return {"gate_up": matrix(2 * INNER, HIDDEN), "down": matrix(HIDDEN, INNER)}


def value(name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def model(nodes: list[ir.Node], inputs: list[ir.Value], output: ir.Value) -> ir.Model:
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", HIDDEN])
    imports = {"": 21, DOMAIN: 1, MICROSOFT: 1}
    return ir.Model(ir.Graph(inputs, [output], nodes=nodes, opset_imports=imports, name="experts"), ir_version=10)


def session(graph: ir.Model, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(ir.serde.serialize_model(graph).SerializeToString(), options)


def branches(codes: Codes, accuracy_level: int) -> ir.Model:
    """What bundles have: the product's own lowering, over MatMulNBits."""
    x = value("x", ir.DataType.FLOAT, ["batch", "sequence", HIDDEN])
    experts = value("experts", ir.DataType.INT64, ["positions", CHOSEN])
    weights = value("weights", ir.DataType.FLOAT, ["positions", CHOSEN])
    output = ir.Value(name="y")
    names = {part: [f"{part}.{index}" for index in range(EXPERTS)] for part in codes}
    attributes = {**names, "hidden_size": HIDDEN, "intermediate_size": INNER}
    routed = ir.Node(
        DOMAIN,
        "RoutedExperts",
        [x, experts, weights],
        ir.convenience.convert_attributes(attributes),
        outputs=[output],
        name="routed",
        metadata_props={BLOCK: "block"},
    )
    graph = model([routed], [x, experts, weights], output)
    LowerExpertsPass()(graph)
    LowerGatedActivationPass()(graph)
    for node in [node for node in graph.graph.all_nodes() if node.op_type == "Linear"]:
        part, index = node.attributes["weights"].as_strings()[0].rsplit(".", 1)
        packed, scales = (array[int(index)] for array in codes[part])
        rewrite = Rewrite(graph, node)
        rows, width = scales.shape[0], scales.shape[1] * GROUP
        inputs = [
            node.inputs[0],
            rewrite.constant(f"{part}.{index}.q", packed.reshape(rows, -1, GROUP // 2)),
            rewrite.constant(f"{part}.{index}.scales", scales),
        ]
        kernel = {"K": width, "N": rows, "bits": 4, "block_size": GROUP, "accuracy_level": accuracy_level}
        rewrite.finish(*rewrite.op("MatMulNBits", inputs, kernel, domain=MICROSOFT))
    graph.graph.opset_imports.pop(DOMAIN)
    return graph


def single(codes: Codes) -> ir.Model:
    """QMoE, whose fused gate and up are interleaved row by row, on the logarithms of what was chosen."""
    x = value("x", ir.DataType.FLOAT, ["batch", "sequence", HIDDEN])
    logits = value("logits", ir.DataType.FLOAT, ["positions", EXPERTS])
    output = ir.Value(name="y")

    def interleaved(array: NDArray[Any]) -> NDArray[Any]:
        gate, up = np.split(array, 2, axis=1)
        return np.ascontiguousarray(np.stack([gate, up], 2).reshape(array.shape))

    arrays = {
        "fc1": interleaved(codes["gate_up"][0]), "fc1_scales": interleaved(codes["gate_up"][1]),
        "fc2": codes["down"][0], "fc2_scales": codes["down"][1],
    }  # fmt: skip
    tensors = {
        name: ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
            const_value=ir.tensor(array, name=name),
        )
        for name, array in arrays.items()
    }
    attributes = {
        "k": CHOSEN, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0,
        "normalize_routing_weights": 1, "expert_weight_bits": 4, "block_size": GROUP, "weights_prepacked": 0,
    }  # fmt: skip
    node = ir.Node(
        MICROSOFT,
        "QMoE",
        [x, logits, tensors["fc1"], tensors["fc1_scales"], None, tensors["fc2"], tensors["fc2_scales"]],
        ir.convenience.convert_attributes(attributes),
        outputs=[output],
        name="qmoe",
    )
    graph = model([node], [x, logits], output)
    for tensor in tensors.values():
        graph.graph.register_initializer(tensor)
    graph.graph.opset_imports.pop(DOMAIN)
    return graph


def feeds(rng: np.random.Generator, positions: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same inputs and choices for both."""
    x = rng.standard_normal((1, positions, HIDDEN)).astype(np.float32)
    experts = np.argsort(rng.random((positions, EXPERTS)), 1)[:, :CHOSEN].astype(np.int64)
    scores = rng.random((positions, CHOSEN)).astype(np.float32) + 0.1
    logits = np.full((positions, EXPERTS), -1e4, np.float32)
    np.put_along_axis(logits, experts, np.log(scores), 1)
    weights = scores / scores.sum(1, keepdims=True)
    return {"x": x, "experts": experts, "weights": weights}, {"x": x, "logits": logits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    codes = random_codes(rng)
    exact = session(branches(codes, 0), options.threads)
    ours, theirs = session(branches(codes, 4), options.threads), session(single(codes), options.threads)
    given = feeds(rng, 16)
    outputs = [runtime.run(None, feed)[0] for runtime, feed in ((exact, given[0]), (theirs, given[1]))]
    difference = float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max())
    document: dict[str, Any] = {
        "command": "python -m benchmarks.experts",
        "processor": machine.processor_name(),
        "threads": options.threads,
        "versions": machine.library_versions(),
        "relative_difference": difference,
        "milliseconds": {},
    }
    print(f"largest difference at accuracy_level 0: {difference:.1e} of the largest output")
    for positions, rounds in ROUNDS.items():
        taken: dict[str, list[float]] = {"If": [], "QMoE": []}
        for _ in range(rounds):
            mine, its = feeds(rng, positions)
            for name, runtime, feed in (("If", ours, mine), ("QMoE", theirs, its)):
                started = time.perf_counter()
                runtime.run(None, feed)
                taken[name].append(1e3 * (time.perf_counter() - started))
        document["milliseconds"][str(positions)] = {
            name: [round(min(times), 2), round(statistics.median(times), 2)] for name, times in taken.items()
        }
        shown = ", ".join(f"{name} {min(times):.1f} ({statistics.median(times):.1f})" for name, times in taken.items())
        print(f"{positions:4} positions, ms, least (median): {shown}")
    if options.output:
        options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
