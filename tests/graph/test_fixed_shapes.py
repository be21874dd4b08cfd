"""Graphs of fixed shapes: nothing in them is symbolic, and they compute what transformers and the other graphs do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from forms import CPU, EXACT, Session, changed, weights_of
from forms import export as export_dynamic
from models import MIXTURE, write_checkpoint

from glmexport.assembly.external import write_graphs
from glmexport.assembly.genai import loop_config
from glmexport.assembly.write import graphs_of
from glmexport.bundle.loop import FixedLoopConfig
from glmexport.engine.core.graphs import FixedGraph
from glmexport.engine.graph_opening import fixed_names
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Format
from glmexport.foundation.target import Target, open_target
from glmexport.graph.caches import cache_bytes_per_token
from glmexport.graph.fixed import fixed_sizes
from glmexport.lowering.explain import lowerings
from glmexport.lowering.fixed_attention import UNSEEN
from glmexport.lowering.pipeline import lower
from glmexport.quantization.weights import Weights
from glmexport.reference.reference import Reference

TOLERANCE = 1e-4
CHUNK, CAPACITY = 16, 56
GRAPHS = ("model.onnx", "step.onnx", "scoring.onnx")
FIXED = {"chunk": CHUNK, "capacity": CAPACITY}
FP32 = FIXED | {"activations": "float32"}
SIGNED = Format(bits=4, group_size=32, symmetric=True)
#: What the provider's documentation lists, as far as graphs have it.
TRANSLATED = {
    "Add", "Cast", "Concat", "DequantizeLinear", "Div", "Floor", "Gather", "LessOrEqual", "MatMul", "Mul", "ReduceMean",
    "Reshape", "ScatterND", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
}
#: No layer is a mixture, so that this is a dense model with rotated halves and norms of heads.
DENSE = MIXTURE | {"first_k_dense_replace": 2, "use_qk_norm": True}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4-tied-a-key-head-each": (
        "glm4",
        {"attention_bias": False, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "glm-yarn": ("glm", {"rope_parameters": YARN}),
    "glm-heads-of-12": ("glm", {"head_dim": 12}),
    "glm4_moe-dense": ("glm4_moe", DENSE),
}
IDS = np.random.default_rng(1).integers(0, 250, CAPACITY)


@dataclass(frozen=True)
class Fixed:
    """The graphs of one bundle on the CPU provider."""

    directory: Path
    config: FixedLoopConfig

    def graph(self, name: str) -> FixedGraph:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        session = onnxruntime.InferenceSession(self.directory / name, options, providers=[CPU])
        return FixedGraph(session, fixed_names(self.config, session))

    def scores(self, ids: np.ndarray = IDS) -> np.ndarray:
        return self.graph("scoring.onnx").scores(ids)


def export(weights: Weights, target: Target, out: Path) -> Fixed:
    architecture = weights.architecture
    tables = Reference(weights.checkpoint, architecture).rotary_tables(fixed_sizes(architecture, target.graph).capacity)
    graphs = {
        name: lower(graph, target, weights, tables) for name, graph in graphs_of(architecture, target.graph).items()
    }
    assert tuple(graphs) == GRAPHS
    write_graphs(graphs, out, Silent())
    return Fixed(out, FixedLoopConfig.model_validate(loop_config(architecture, target)[1]))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    base = tmp_path_factory.mktemp("checkpoints")
    return {
        name: (base / name, write_checkpoint(base / name, family, num_hidden_layers=2, **changes))
        for name, (family, changes) in VARIANTS.items()
    }


def original(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def symbolic(path: Path) -> list[str]:
    """Values any of whose dimensions is not a number, and those of which nothing is known."""
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    known = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.input, *inferred.output)}
    names = [value.name for value in inferred.input] + [name for node in inferred.node for name in node.output]
    return [
        name
        for name in names
        if name not in known or not all(size.HasField("dim_value") for size in known[name].shape.dim)
    ]


@pytest.mark.parametrize("activations", ["float32", "float16"])
@pytest.mark.parametrize("form", [None, SIGNED], ids=["full", "signed"])
@pytest.mark.parametrize("name", ["glm", "glm4", "glm4_moe-dense"])
def test_every_dimension_is_a_number(
    checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path, name: str, form: Format | None, activations: str
) -> None:
    """And every operator is a standard one that the provider's documentation lists."""
    weights = weights_of(checkpoints[name][0], tmp_path / "work", form)
    target = changed("qnn", graph=FIXED | {"activations": activations})
    export(weights, target, tmp_path / "out")
    for graph in GRAPHS:
        assert symbolic(tmp_path / "out" / graph) == []
        nodes = list(ir.load(tmp_path / "out" / graph).graph)
        assert {node.domain for node in nodes} == {""}
        assert {node.op_type for node in nodes} <= TRANSLATED


def test_a_symbolic_dimension_would_be_found(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    export_dynamic(weights_of(checkpoints["glm"][0], tmp_path / "work", None), EXACT, tmp_path / "out")
    assert "input_ids" in symbolic(tmp_path / "out" / "model.onnx")


@pytest.mark.parametrize("name", VARIANTS)
def test_chunks_and_tokens_are_one_pass_of_transformers(
    checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path, name: str
) -> None:
    path, model = checkpoints[name]
    fixed = export(weights_of(path, tmp_path / "work", None), changed("qnn", graph=FP32), tmp_path / "out")
    # Whole chunks only, so that none passes the end of the caches.
    assert fixed.config.context_length == 48
    expected = original(model, IDS[:48])
    assert np.abs(fixed.scores(IDS[:48]) - expected).max() <= TOLERANCE
    chunk, step = fixed.graph("model.onnx"), fixed.graph("step.onnx")
    assert (chunk.positions, step.positions) == (CHUNK, 1)
    caches = chunk.begin()
    for start, stop in ((0, 16), (16, 21), (21, 22), (22, 37), (37, 38), (38, 39)):
        graph = step if stop - start == 1 else chunk
        logits = graph.run(caches, IDS[start:stop], start)
        assert logits.shape == (1, expected.shape[1])
        assert np.abs(logits[0] - expected[stop - 1]).max() <= TOLERANCE, (start, stop)


def test_what_fills_a_chunk_up_changes_nothing(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    path, model = checkpoints["glm4"]
    fixed = export(weights_of(path, tmp_path / "work", None), changed("qnn", graph=FP32), tmp_path / "out")
    graph, step = fixed.graph("model.onnx"), fixed.graph("step.onnx")
    names = [value.name for value in graph.session.get_inputs()]
    rows = []
    for filling in (0, 77):
        held = {spec.input: spec.array(spec.empty(1, 0)).copy() for spec in graph.names.caches}
        # Whatever a longer text left behind the sequence is not seen either.
        for array in held.values():
            array[:, 5:] = filling
        feeds = {"input_ids": np.full((1, CHUNK), filling), "position_ids": np.arange(CHUNK)[None]}
        feeds["input_ids"][0, :5] = IDS[:5]
        feeds["asked_position"] = np.array([4])
        assert set(names) == {*feeds, *held}
        logits, *present = graph.session.run(None, feeds | held)
        feeds = {"input_ids": IDS[None, 5:6], "position_ids": np.array([[5]])}
        following, *_ = step.session.run(None, feeds | dict(zip(held, present, strict=True)))
        rows.append(np.concatenate([logits[0], following[0]]))
    assert np.array_equal(rows[0], rows[1])
    assert np.abs(rows[0] - original(model, IDS[:6])[4:]).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["glm", "glm4", "glm4-tied-a-key-head-each", "glm4_moe-dense"])
def test_quantized_they_are_the_other_graphs(
    checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path, name: str
) -> None:
    weights = weights_of(checkpoints[name][0], tmp_path / "work", SIGNED)
    export_dynamic(weights, EXACT, tmp_path / "any")
    expected, *_ = Session(tmp_path / "any" / "scoring.onnx")(IDS[None, :48])
    fixed = export(weights, changed("qnn", graph=FP32), tmp_path / "fixed")
    assert np.abs(fixed.scores(IDS[:48]) - expected[0]).max() <= 1e-5


def test_packed_projections_are_the_same(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    weights = weights_of(checkpoints["glm4"][0], tmp_path / "work", None)
    apart = export(weights, changed("qnn", graph=FP32), tmp_path / "apart")
    together = export(weights, changed("qnn", graph=FP32 | {"packed_qkv": True}), tmp_path / "together")
    assert symbolic(tmp_path / "together" / "model.onnx") == []
    assert np.abs(apart.scores(IDS[:48]) - together.scores(IDS[:48])).max() < 1e-5


@pytest.mark.parametrize("name", ["glm", "glm4_moe-dense"])
def test_in_float16_scores_stay_in_float32(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path, name: str) -> None:
    path, model = checkpoints[name]
    fixed = export(weights_of(path, tmp_path / "work", None), changed("qnn", graph=FIXED), tmp_path / "out")
    difference = np.abs(fixed.scores(IDS[:48]) - original(model, IDS[:48])).max()
    assert 0 < difference < 1e-2
    loaded = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(loaded, check_type=True, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    by_operator: dict[str, set[int]] = {}
    for node in inferred.node:
        by_operator.setdefault(node.op_type, set()).update(types[output] for output in node.output)
    assert by_operator["Softmax"] == by_operator["Where"] == {onnx.TensorProto.FLOAT}
    assert by_operator["MatMul"] == by_operator["ScatterND"] == {onnx.TensorProto.FLOAT16}
    # A score of a position that is not seen is none, and fp16 has a number for it.
    assert np.isfinite(np.float16(UNSEEN)) and np.exp(np.float32(UNSEEN)) == 0


def test_all_graphs_have_one_set_of_weights(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    fixed = export(
        weights_of(checkpoints["glm4"][0], tmp_path / "work", SIGNED), changed("qnn", graph=FIXED), tmp_path / "out"
    )
    places: list[dict[str, tuple[str, int | None]]] = []
    for name in GRAPHS:
        stored = [value.const_value for value in ir.load(fixed.directory / name).graph.initializers.values()]
        places.append({str(t.name): (str(t.location), t.offset) for t in stored if isinstance(t, ir.ExternalTensor)})
        assert (fixed.directory / name).stat().st_size < 200_000
    assert places[0] == places[1] == places[2]
    assert len(set(places[0].values())) == len(places[0]) > 20


def test_sizes_follow_from_the_target_and_the_model(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    weights = weights_of(checkpoints["glm4"][0], tmp_path / "work", None)
    architecture = weights.architecture
    assert architecture.context_length == 256
    for (chunk, capacity), expected in {
        (64, 4096): (64, 256), (100, 4096): (100, 200), (64, 200): (64, 192), (512, 4096): (256, 256),
        (64, 40): (40, 40),
    }.items():  # fmt: skip
        limits = changed("qnn", graph={"chunk": chunk, "capacity": capacity}).graph
        found = fixed_sizes(architecture, limits)
        assert (found.chunk, found.capacity) == expected
    target = changed("qnn", graph=FIXED)
    caches = export(weights, target, tmp_path / "out").graph("step.onnx").begin()
    assert caches.bytes == 48 * cache_bytes_per_token(architecture, target.graph)


def test_the_same_graphs_are_the_same_bytes(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    weights = weights_of(checkpoints["glm4"][0], tmp_path / "work", SIGNED)
    for name in ("once", "again"):
        export(weights, changed("qnn", graph=FIXED), tmp_path / name)
    files = [path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*") if path.is_file()]
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_the_shipped_target_says_what_it_gets() -> None:
    told = {lowering.name: lowering.does for lowering in lowerings(open_target("qnn"))}
    assert told["chunk"] == "64 positions of a prompt" and told["context"].startswith("4096 positions")
    assert told["mixtures of experts"] == told["cache of latent attention"] == "refused"
    assert "standard operators" in told["rotary embedding"] and "all fixed" in told["shapes"]
    assert "chunk" not in {lowering.name for lowering in lowerings(EXACT)}
