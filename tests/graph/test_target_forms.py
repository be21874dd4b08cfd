"""Every form that a target can ask for computes what the others compute, as far as the CPU provider has kernels."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from forms import CPU, EXACT, Session, changed, export, weights_of
from models import MIXTURE, write_checkpoint
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from glmexport.assembly.cache_scales import calibrate_caches, set_scales
from glmexport.assembly.read import BundleWeights
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Format
from glmexport.graph.caches import cache_bytes_per_token
from glmexport.lowering.precision import as_type
from glmexport.quantization.weights import Weights

W4, W8 = Format(bits=4, group_size=32), Format(bits=8, group_size=32)
SIGNED = Format(bits=4, group_size=32, symmetric=True)
MICROSOFT = "com.microsoft::"
#: Without operators that replace several standard ones.
PLAIN = [f"{MICROSOFT}GroupQueryAttention", f"{MICROSOFT}RotaryEmbedding"]
QDQ = {"form": "QDQ", "accuracy_level": 0}
IDS = np.random.default_rng(1).integers(0, 250, (2, 24))
FAMILIES: dict[str, dict[str, Any]] = {"glm": {}, "glm4": {}, "glm4_moe": {**MIXTURE, "use_qk_norm": True}}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("checkpoints")
    for family, changes in FAMILIES.items():
        write_checkpoint(base / family, family, num_hidden_layers=2, **changes)
    # Three and a half groups: no matrix fills its groups.
    write_checkpoint(base / "odd", "glm4", num_hidden_layers=1, hidden_size=112, intermediate_size=80)
    write_checkpoint(base / "tied", "glm", num_hidden_layers=1, tie_word_embeddings=True)
    return {path.name: path for path in base.iterdir()}


def logits(weights: Weights, target: Any, out: Path, **options: Any) -> np.ndarray:
    """Of every position; what is wrong about one decoded step behind them fails here."""
    export(weights, target, out)
    session = Session(out / "scoring.onnx", **options)
    whole, *_ = session(IDS)
    first, *past = session(IDS[:1, :16])
    assert np.abs(first - whole[:1, :16]).max() < 1e-2
    step, *_ = session(IDS[:1, 16:17], past, 17)
    assert np.abs(step[0, 0] - whole[0, 16]).max() < 1e-2
    assert whole.dtype == np.float32
    return whole


@pytest.mark.parametrize("form", [W4, W8, SIGNED], ids=lambda form: form.label)
@pytest.mark.parametrize("optimized", [True, False])
def test_qdq_is_matmulnbits(checkpoints: dict[str, Path], tmp_path: Path, form: Format, optimized: bool) -> None:
    weights = weights_of(checkpoints["glm4"], tmp_path / "work", form)
    expected = logits(weights, EXACT, tmp_path / "packed")
    target = changed(weights=QDQ, graph={"contrib_operators": PLAIN, "packed_qkv": False, "latent_cache": False})
    found = logits(weights, target, tmp_path / "qdq", optimized=optimized)
    assert np.abs(found - expected).max() < 1e-5
    operators = {node.op_type for node in ir.load(tmp_path / "qdq" / "scoring.onnx").graph}
    assert not {"MatMulNBits", "GatherBlockQuantized", "SkipSimplifiedLayerNormalization"} & operators
    assert "DequantizeLinear" in operators


@pytest.mark.parametrize("form", [W4, W8, SIGNED], ids=lambda form: form.label)
@pytest.mark.parametrize("operators", [PLAIN, list(EXACT.graph.contrib_operators)], ids=["plain", "fused"])
def test_one_table_is_looked_up_in_and_multiplied_by(
    checkpoints: dict[str, Path], tmp_path: Path, form: Format, operators: list[str]
) -> None:
    """In QDQ form too, where the product has the table the other way round."""
    weights = weights_of(checkpoints["tied"], tmp_path / "work", form)
    expected = logits(weights, EXACT, tmp_path / "packed")
    target = changed(weights=QDQ, graph={"contrib_operators": operators, "packed_qkv": False, "latent_cache": False})
    assert np.abs(logits(weights, target, tmp_path / "qdq") - expected).max() < 1e-5


@pytest.mark.parametrize("family", ["glm4", "odd", "tied"])
@pytest.mark.parametrize("form", [W4, W8, SIGNED], ids=lambda form: form.label)
def test_qdq_dequantizes_to_the_very_numbers(
    checkpoints: dict[str, Path], tmp_path: Path, form: Format, family: str
) -> None:
    """What ONNX Runtime's DequantizeLinear gives, bit by bit; and what is read back of the graph's file."""
    form = form.model_copy(update={"group_size": 16}) if family == "odd" else form
    weights = weights_of(checkpoints[family], tmp_path / "work", form)
    export(weights, changed(weights=QDQ, graph={"packed_qkv": False}), tmp_path / "qdq")
    path = tmp_path / "qdq" / "scoring.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    for node in nodes:
        model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
    onnx.save(model, path)
    session = Session(path, optimized=False).session
    feeds = {"input_ids": IDS[:1, :1], "attention_mask": np.ones((1, 1), np.int64)}
    for entry in session.get_inputs():
        if entry.name.startswith("past"):
            feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
    matrices = session.run([node.output[0] for node in nodes], feeds)
    stored = BundleWeights(tmp_path / "qdq", weights.architecture)
    assert len(nodes) == len(list(weights.architecture.linears))
    for node, matrix in zip(nodes, matrices, strict=True):
        key = node.input[0].removesuffix(".q")
        decided = weights.quantized(key)
        assert torch.equal(torch.from_numpy(matrix.T.copy()), decided.dequantize()), key
        read = stored.quantized(key)
        assert read is not None and read.digest() == decided.digest()


def test_a_gathered_embedding_is_read_back(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for form in (W4, W8, SIGNED):
        out = tmp_path / form.label
        weights = weights_of(checkpoints["glm4"], tmp_path / f"work-{form.label}", form)
        export(weights, changed(weights=QDQ, graph={"contrib_operators": PLAIN, "latent_cache": False}), out)
        key = weights.architecture.embedding
        read = BundleWeights(out, weights.architecture).quantized(key)
        assert read is not None and read.digest() == weights.quantized(key).digest()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [True, False])
def test_rotation_before_attention(checkpoints: dict[str, Path], tmp_path: Path, family: str, packed: bool) -> None:
    weights = weights_of(checkpoints[family], tmp_path / "work", None)
    expected = logits(weights, EXACT, tmp_path / "inside")
    target = changed(graph={"rope_in_attention": False, "packed_qkv": packed})
    assert np.abs(logits(weights, target, tmp_path / "outside") - expected).max() < 1e-5
    nodes = list(ir.load(tmp_path / "outside" / "scoring.onnx").graph)
    attention = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    assert {node.attributes["do_rotary"].as_int() for node in attention} == {0}
    assert sum(node.op_type == "RotaryEmbedding" for node in nodes) == 2 * len(attention)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"activations": "float16", "latent_cache": False},
        {"kv_cache": "int8", "latent_cache": False},
        {"kv_cache": "int4", "latent_cache": False},
    ],
    ids=lambda limits: "-".join(map(str, limits.values())) or "plain",
)
def test_a_token_of_context_takes_what_is_said(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, limits: dict[str, Any]
) -> None:
    weights, target = weights_of(checkpoints[family], tmp_path / "work", None), changed(graph=limits)
    export(weights, target, tmp_path / "out")
    specs = Session(tmp_path / "out" / "model.onnx").specs
    allocated = sum(spec.array(spec.empty(1, 10)).nbytes for spec in specs)
    assert allocated == 10 * cache_bytes_per_token(weights.architecture, target.graph)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_in_standard_operators(checkpoints: dict[str, Path], tmp_path: Path, family: str) -> None:
    weights = weights_of(checkpoints[family], tmp_path / "work", None)
    expected = logits(weights, EXACT, tmp_path / "operator")
    target = changed(graph={"norm": "arithmetic", "contrib_operators": PLAIN, "latent_cache": False})
    assert np.abs(logits(weights, target, tmp_path / "arithmetic") - expected).max() < 1e-5
    assert not any("Normalization" in node.op_type for node in ir.load(tmp_path / "arithmetic" / "model.onnx").graph)


@pytest.mark.parametrize("norm", ["operator", "arithmetic"])
@pytest.mark.parametrize("form", [None, W4], ids=["full", "w4g32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float16(checkpoints: dict[str, Path], tmp_path: Path, family: str, form: Format | None, norm: str) -> None:
    weights = weights_of(checkpoints[family], tmp_path / "work", form)
    expected = logits(weights, EXACT, tmp_path / "float32")
    operators = [*EXACT.graph.contrib_operators]
    if norm == "arithmetic":
        operators.remove(f"{MICROSOFT}SkipSimplifiedLayerNormalization")
    target = changed(
        graph={"activations": "float16", "norm": norm, "contrib_operators": operators}, weights={"accuracy_level": 0}
    )
    found = logits(weights, target, tmp_path / "float16")
    difference = np.abs(found - expected).max()
    assert 0 < difference < 1e-2
    graph = ir.load(tmp_path / "float16" / "model.onnx").graph
    caches = [value for value in (*graph.inputs, *graph.outputs) if "key" in str(value.name)]
    assert {value.dtype for value in caches} == {ir.DataType.FLOAT16}
    kept = {name for name, value in graph.initializers.items() if value.dtype is ir.DataType.FLOAT}
    expected_kept = ("gate.weight", "e_score_correction_bias") if family == "glm4_moe" else ()
    expected_kept += ("norm.weight", "layernorm.weight") if norm == "arithmetic" else ()
    # Of routers and norms the numbers, and constants of their arithmetic, which have no more than one element.
    assert all(
        any(part in name for part in expected_kept) or int(np.prod(graph.initializers[name].shape.numpy())) <= 1
        for name in kept
    )
    if family == "glm4_moe":
        assert any("e_score_correction_bias" in name for name in kept)


def test_bfloat16_is_what_the_schemas_allow(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """ONNX Runtime infers and checks the type of every value before it looks for kernels, of which the CPU has none."""
    for name, form in (("glm4", W4), ("glm4_moe", None)):
        weights = weights_of(checkpoints[name], tmp_path / f"work-{name}", form)
        out = tmp_path / name
        export(weights, changed(graph={"activations": "bfloat16", "rope_in_attention": name == "glm4"}), out)
        with pytest.raises(NoKernel, match="Could not find an implementation"):
            Session(out / "model.onnx")
        stored = ir.load(out / "model.onnx").graph.initializers["model.norm.weight"]
        assert stored.dtype is ir.DataType.BFLOAT16
    # A graph that mixes types is refused for that, not for a kernel.
    model = onnx.load(out / "model.onnx", load_external_data=False)
    (gain,) = [tensor for tensor in model.graph.initializer if tensor.name == "model.norm.weight"]
    gain.CopyFrom(onnx.numpy_helper.from_array(np.ones(128, np.float32), gain.name))
    onnx.save(model, out / "mixed.onnx")
    with pytest.raises(Exception, match="Type Error"):
        Session(out / "mixed.onnx")


def test_a_number_beyond_the_type_is_an_error() -> None:
    huge = np.array([1.0, -7e4, np.inf], np.float32)
    told = r"norm has 1 numbers beyond what float16 holds, the largest 7e\+04"
    with pytest.raises(InputError, match=told) as refused:
        as_type(huge, ir.DataType.FLOAT16, "norm")
    assert "bfloat16" in refused.value.next_step
    assert np.isinf(as_type(huge[2:], ir.DataType.FLOAT16, "norm")).all()
    assert float(as_type(huge, ir.DataType.BFLOAT16, "norm")[1]) == -70144.0


@pytest.mark.parametrize("scales", ["channel", "tensor"])
@pytest.mark.parametrize("kind,tolerance", [("int8", 0.05), ("int4", 0.6)])
@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_a_quantized_cache(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, kind: str, tolerance: float, scales: str
) -> None:
    weights = weights_of(checkpoints[family], tmp_path / "work", None)
    expected = logits(weights, EXACT, tmp_path / "floats")
    target = changed(graph={"kv_cache": kind, "kv_scales": scales})
    export(weights, target, tmp_path / "codes")
    # Every token, so that no code has to be clipped.
    text = [*np.random.default_rng(2).integers(0, 250, (32, 64)).tolist(), *IDS.tolist()]
    measured = calibrate_caches(
        tmp_path / "floats" / "model.onnx", weights.architecture, target.graph, text, Silent()
    )
    path = tmp_path / "codes" / "scoring.onnx"
    model = ir.load(path)
    set_scales(model, measured)
    ir.save(model, path)
    session = Session(path)
    found, *past = session(IDS)
    assert 0 < np.abs(found - expected).max() < tolerance
    assert past[0].dtype == (np.int8 if kind == "int8" else np.uint8)
    assert past[0].shape[-1] * (1 if kind == "int8" else 2) == 32
    # One at a time behind a prompt: the same numbers as all at once, since either reads codes.
    _, *past = session(IDS[:1, :12])
    for position in range(12, 24):
        step, *past = session(IDS[:1, position : position + 1], past, position + 1)
        assert np.abs(step[0, 0] - found[0, position]).max() < tolerance / 4


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_scales_hold_at_any_position(checkpoints: dict[str, Path], tmp_path: Path, family: str) -> None:
    """A pair that is rotated has one scale, which its radius decides: position 200 fits though text ends at 8."""
    weights = weights_of(checkpoints[family], tmp_path / "work", None)
    export(weights, EXACT, tmp_path / "floats")
    limits = changed(graph={"kv_cache": "int8"}).graph
    graph = tmp_path / "floats" / "model.onnx"
    tokens = np.random.default_rng(3).integers(0, 250, (1, 8))
    measured = calibrate_caches(graph, weights.architecture, limits, tokens.tolist(), Silent())
    # The same tokens far behind others; of the first layer, whose keys do not depend on what was before.
    session = Session(graph)
    before = np.random.default_rng(4).integers(0, 250, (1, 200))
    _, *past = session(before)
    _, *present = session(tokens, past, 208)
    names = session.outputs[1:]
    keys = np.abs(present[names.index("present.0.key")][0, :, 200:]).max(axis=1)
    scale = measured["block_000.key_cache.scale"][:, 0]
    assert (keys <= 127 * scale * (1 + 1e-5)).all()
    alone = np.abs(present[names.index("present.0.key")][0, :, :8]).max(axis=1)
    assert (scale * 127 > alone * 0.5).any()


def test_files_stay_below_the_limit(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    weights = weights_of(checkpoints["glm4"], tmp_path / "work", W4)
    whole = export(weights, EXACT, tmp_path / "whole")
    cut = export(weights, EXACT, tmp_path / "cut", limit=20_000)
    sizes = {path.name: path.stat().st_size for path in (cut / "weights").iterdir()}
    assert len(sizes) > len(list((whole / "weights").iterdir()))
    assert {name for name in sizes if name.startswith("block_000")} >= {"block_000.data", "block_000.1.data"}
    stored = [value.const_value for value in ir.load(cut / "model.onnx").graph.initializers.values()]
    largest = max(value.nbytes for value in stored if isinstance(value, ir.ExternalTensor))
    assert max(sizes.values()) <= max(20_000, largest)
    expected, found = (Session(path / "scoring.onnx")(IDS)[0] for path in (whole, cut))
    assert np.array_equal(expected, found)
    again = export(weights, EXACT, tmp_path / "again", limit=20_000)
    for one, other in pairwise((cut, again)):
        assert {p.name: p.read_bytes() for p in (one / "weights").iterdir()} == {
            p.name: p.read_bytes() for p in (other / "weights").iterdir()
        }


def test_nothing_is_converted_for_float32(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    weights = weights_of(checkpoints["glm4"], tmp_path / "work", None)
    export(weights, EXACT, tmp_path / "bundle")
    session = onnxruntime.InferenceSession(tmp_path / "bundle" / "model.onnx", providers=[CPU])
    assert {value.type for value in session.get_outputs()} == {"tensor(float)"}
    nodes = ir.load(tmp_path / "bundle" / "model.onnx").graph
    assert not any(node.op_type == "Cast" and "logits" in str(node.name) for node in nodes)
