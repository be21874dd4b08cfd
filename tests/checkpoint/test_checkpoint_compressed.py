"""Matrices of compressed-tensors checkpoints: what they are read as, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import write_checkpoint
from compressed_files import fp8, fp8_table, group, int8, packed, rounded_to_bf16, table, weights
from gptq_files import Matrix
from safetensors.torch import load_file

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Progress

MODULE = "model.a_proj"
KEY = f"{MODULE}.weight"
FILES = Path(__file__).parent / "compressed_tensors"
CASES = json.loads((FILES / "configs.json").read_text(encoding="utf-8"))


class Remarks(Progress):
    """Keeps what is remarked."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def remark(self, text: str) -> None:
        self.texts.append(text)


def write(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any],
    progress: Progress | None = None,
    key: str = "quantization_config",
) -> Checkpoint:
    config = {"model_type": "glm4", key: settings}
    write_checkpoint(directory, {"model.safetensors": {**tensors, "norm": torch.ones(3)}}, config=config)
    return Checkpoint.open(directory, progress)


def matrix_of(
    bits: int = 4, group_size: int = 32, symmetric: bool = False, rows: int = 40, columns: int = 768
) -> Matrix:
    return rounded_to_bf16(Matrix.random(rows, columns, bits, group_size, symmetric))


def refused(*words: str) -> Any:
    return pytest.raises(CheckpointError, match=".*".join(words))


@pytest.mark.parametrize("case", CASES)
def test_what_the_library_wrote_is_what_it_reads(case: str, tmp_path: Path) -> None:
    stored = load_file(FILES / "matrices.safetensors")
    tensors = {f"{MODULE}.{key.removeprefix(f'{case}.')}": t for key, t in stored.items() if key.startswith(f"{case}.")}
    expected = tensors.pop(f"{MODULE}.expected")
    checkpoint = write(tmp_path, tensors, CASES[case])
    assert torch.equal(checkpoint.read(KEY), expected)
    assert torch.equal(checkpoint.rows(KEY, 3, 10), expected[3:10])
    assert set(checkpoint.tensors) == {KEY, "norm"} and checkpoint.shape(KEY) == (12, 128)
    assert checkpoint.labels == {KEY: {"int8-row": "w8row-sym"}.get(case, case)}
    assert set(checkpoint.quantized) == (set() if case.startswith("fp8") else {KEY})
    assert checkpoint.stored.layout == "compressed-tensors" and checkpoint.stored.inexact is None


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size"), [(2, 64), (4, 32), (4, 16), (8, 64), (4, 128), (4, -1), (8, -1), (4, 384)]
)
@pytest.mark.parametrize("packing", [packed, int8])
def test_integers_are_read_code_by_code(
    tmp_path: Path,
    packing: Callable[..., dict[str, torch.Tensor]],
    bits: int,
    group_size: int,
    symmetric: bool,
    scales: torch.dtype,
) -> None:
    matrix = matrix_of(bits, group_size, symmetric)
    strategy = "channel" if group_size == -1 else "group"
    arguments = weights(num_bits=bits, group_size=group_size, symmetric=symmetric, strategy=strategy)
    kind = "pack-quantized" if packing is packed else "int-quantized"
    tensors = packing(MODULE, matrix, scales, symmetric=symmetric)
    checkpoint = write(tmp_path, tensors, table(group(arguments), kind=kind))
    assert torch.equal(checkpoint.read(KEY).double(), matrix.weight)
    assert torch.equal(checkpoint.rows(KEY, 3, 17).double(), matrix.weight[3:17])
    codes = checkpoint.codes(KEY, 5, 40)
    form = checkpoint.quantized[KEY].exact
    groups = torch.arange(0, 768, form.group_size)
    assert torch.equal(codes.codes.long(), matrix.codes[5:])
    assert torch.equal(codes.scales.half(), matrix.scales[5:, matrix.groups[groups]])
    assert torch.equal(codes.zero_points.long(), matrix.zero_points[5:, matrix.groups[groups]])
    assert (form.bits, form.symmetric) == (bits, symmetric)


def test_rows_that_no_word_ends_with_are_read(tmp_path: Path) -> None:
    matrix = matrix_of(rows=21, columns=100)
    checkpoint = write(tmp_path, packed(MODULE, matrix), table())
    assert checkpoint.shape(KEY) == (21, 100)
    assert torch.equal(checkpoint.rows(KEY, 13, 21).double(), matrix.weight[13:])


def test_one_scale_for_a_whole_matrix_and_zero_points_of_before_are_read(tmp_path: Path) -> None:
    matrix = matrix_of(8, -1, True)
    matrix.scales = matrix.scales[:1].expand(40, 1)
    tensors = packed(MODULE, matrix, symmetric=True) | {f"{MODULE}.weight_scale": matrix.scales[0].bfloat16()}
    arguments = weights(num_bits=8, strategy=None, symmetric=True)
    assert torch.equal(write(tmp_path / "a", tensors, table(group(arguments))).read(KEY).double(), matrix.weight)
    matrix = matrix_of()
    points = {f"{MODULE}.weight_zero_point": (matrix.zero_points - 8).to(torch.int8)}
    checkpoint = write(tmp_path / "b", packed(MODULE, matrix) | points, table())
    assert torch.equal(checkpoint.read(KEY).double(), matrix.weight)


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", ["row", "flat", "matrix", "scalar"])
def test_fp8_is_number_times_scale(tmp_path: Path, shape: str, scales: torch.dtype) -> None:
    values = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    strategy = "channel" if shape in ("row", "flat") else "tensor"
    numbers, scale = fp8(values, strategy, scales)
    expected = numbers.float() * scale.float()
    stored = scale.flatten() if shape == "flat" else scale.squeeze() if shape == "scalar" else scale
    checkpoint = write(tmp_path, {KEY: numbers, f"{MODULE}.weight_scale": stored}, fp8_table(strategy))
    assert torch.equal(checkpoint.read(KEY), expected)
    assert torch.equal(checkpoint.rows(KEY, 7, 33), expected[7:33])
    assert checkpoint.quantized == {} and not checkpoint.coded
    assert checkpoint.labels == {KEY: "fp8-row" if strategy == "channel" else "fp8-matrix"}
    assert checkpoint.tensors[KEY].dtype == "F8_E4M3"


def test_halves_with_scales_of_their_own_are_one_matrix(tmp_path: Path) -> None:
    numbers, scale = fp8(torch.randn(32, 64), "channel")
    tensors = {
        "gate.weight": numbers[:16].clone(), "gate.weight_scale": scale[:16].clone(),
        "up.weight": numbers[16:].clone(), "up.weight_scale": scale[16:].clone(),
    }  # fmt: skip
    checkpoint = write(tmp_path, tensors, fp8_table()).stacked({"both.weight": ("gate.weight", "up.weight")})
    assert torch.equal(checkpoint.read("both.weight"), numbers.float() * scale.float())
    assert checkpoint.labels == {"both.weight": "fp8-row"}


def test_groups_of_modules_have_formats_of_their_own(tmp_path: Path) -> None:
    wide, narrow = matrix_of(8, -1, True), matrix_of()
    numbers, scale = fp8(torch.randn(8, 32), "channel")
    tensors = packed("model.layers.0.down_proj", wide, symmetric=True) | packed("model.layers.0.up_proj", narrow)
    # Layers that draft are often left as they are, without any entry in ignore.
    tensors |= {"head.weight": numbers, "head.weight_scale": scale, "model.layers.1.up_proj.weight": torch.ones(4, 4)}
    rows = weights(num_bits=8, strategy="channel", symmetric=True)
    settings = table(
        group(format="pack-quantized"),
        group(rows, "re:.*layers[.]0.down.*", format="pack-quantized"),
        group(rows | {"type": "float"}, "head", format="float-quantized"),
        kind="mixed-precision",
        ignore=["re:.*gate$", "model.layers.0.mlp.qkv_proj"],
    )
    checkpoint = write(tmp_path, tensors, settings)
    assert checkpoint.labels == {
        "model.layers.0.down_proj.weight": "w8row-sym",
        "model.layers.0.up_proj.weight": "w4g32",
        "head.weight": "fp8-row",
    }
    assert torch.equal(checkpoint.read("model.layers.0.down_proj.weight").double(), wide.weight)


def test_what_is_said_of_activations_and_caches_is_remarked_and_left_aside(tmp_path: Path) -> None:
    remarks = Remarks()
    numbers, scale = fp8(torch.randn(8, 32), "channel")
    more = {f"{MODULE}.input_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    tensors = {KEY: numbers, f"{MODULE}.weight_scale": scale, **more}
    checkpoint = write(tmp_path, tensors, fp8_table(kv_cache_scheme=cache), remarks)
    assert set(checkpoint.tensors) == {KEY, "norm"}
    (remark,) = remarks.texts
    assert "input_activations and kv_cache_scheme quantize what a server computes" in remark


@pytest.mark.parametrize(("value", "exact"), [(2.0**-24, True), (2.0**-25, False), (65504.0, True), (1e-3, True)])
def test_a_scale_that_fp16_does_not_hold_keeps_the_weights_and_not_the_codes(
    tmp_path: Path, value: float, exact: bool
) -> None:
    matrix = matrix_of()
    scales = matrix.scales.float()
    scales[3, 1] = torch.tensor(value).half() if exact else value
    tensors = packed(MODULE, matrix) | {f"{MODULE}.weight_scale": scales}
    checkpoint = write(tmp_path, tensors, table())
    assert checkpoint.coded and (checkpoint.stored.inexact is None) == exact
    assert set(checkpoint.quantized) == ({KEY} if exact else set())
    levels = (matrix.codes - matrix.zero_points[:, matrix.groups]).float()
    assert torch.equal(checkpoint.read(KEY), levels * scales[:, matrix.groups])
    if not exact:
        assert f"{MODULE}.weight_scale is F32 and has 2.98023224e-08" in str(checkpoint.stored.inexact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, value: float, scales: torch.dtype) -> None:
    matrix = matrix_of()
    matrix.scales[2, 2] = value
    with refused("weight_scale", "not finite"):
        write(tmp_path, packed(MODULE, matrix, scales), table()).read(KEY)
    numbers, scale = fp8(torch.randn(8, 32), "channel")
    scale[5] = value
    with refused("weight_scale", "not finite"):
        write(tmp_path, {KEY: numbers, f"{MODULE}.weight_scale": scale}, fp8_table()).read(KEY)


def test_groups_out_of_order_are_refused_and_those_in_order_read(tmp_path: Path) -> None:
    matrix = matrix_of(columns=64, rows=8)
    tensors = packed(MODULE, matrix) | {f"{MODULE}.weight_g_idx": matrix.groups.int()}
    settings = table(group(weights(actorder="group")))
    assert torch.equal(write(tmp_path, tensors, settings).read(KEY).double(), matrix.weight)
    tensors[f"{MODULE}.weight_g_idx"] = matrix.groups.int().flip(0)
    with refused("weight_g_idx assigns inputs to groups out of order"):
        write(tmp_path, tensors, settings)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("weight_scale", None, ("weight_packed is I32", "there is no model.a_proj.weight_scale")),
        ("weight_scale", torch.ones(16, 3), ("weight_scale is F32", "2 scales a row, for w4g32")),
        ("weight_scale", torch.ones(2, 16), ("2 scales a row",)),
        ("weight_scale", torch.ones(16, 2, dtype=torch.int32), ("weight_scale is I32",)),
        ("weight_zero_point", None, ("not symmetric", "no model.a_proj.weight_zero_point")),
        ("weight_zero_point", torch.zeros(16, 2, dtype=torch.int32), ("2 zero points a row",)),
        ("weight_packed", torch.zeros(16, 9, dtype=torch.int32), (r"\[16, 9\]", "16 x 64")),
        ("weight_packed", torch.zeros(16, 8, dtype=torch.int64), ("matrix of I32",)),
        ("weight_packed", torch.zeros(2, 16, 8, dtype=torch.int32), (r"\[2, 16, 8\]", "matrix of I32")),
        ("weight_shape", torch.tensor([1 << 62, 64]), ("does not hold 4611686018427387904 x 64",)),
        ("weight_shape", torch.tensor([16, -64]), ("does not hold 16 x -64",)),
        ("weight_g_idx", torch.zeros(65, dtype=torch.int32), ("weight_g_idx", "each of 64 inputs")),
        ("weight", torch.ones(16, 64, dtype=torch.int8), ("twice",)),
    ],
)
def test_wrong_tensors_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, words: tuple[str, ...]
) -> None:
    tensors = packed(MODULE, matrix_of(rows=16, columns=64))
    tensors.pop(f"{MODULE}.{name}", None)
    if tensor is not None:
        tensors[f"{MODULE}.{name}"] = tensor
    with refused(*words):
        write(tmp_path, tensors, table())


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("weight_scale", None, ("weight is F8_E4M3", "no model.a_proj.weight_scale")),
        ("weight_scale", torch.ones(3, 1), (r"F32 \[3, 1\]", "a scale for each of its rows")),
        ("weight", torch.ones(8, 32), ("is the scale of a matrix that is F32",)),
        ("weight", None, ("is the scale of a matrix that is absent",)),
        ("weight", torch.ones(8, 32).to(torch.float8_e5m2), ("is the scale of a matrix that is F8_E5M2",)),
        ("weight", torch.ones(2, 8, 32).to(torch.float8_e4m3fn), (r"F8_E4M3 \[2, 8, 32\]",)),
    ],
)
def test_wrong_fp8_is_refused(tmp_path: Path, name: str, tensor: torch.Tensor | None, words: tuple[str, ...]) -> None:
    numbers, scale = fp8(torch.randn(8, 32), "channel")
    tensors = {KEY: numbers, f"{MODULE}.weight_scale": scale}
    tensors.pop(f"{MODULE}.{name}")
    if tensor is not None:
        tensors[f"{MODULE}.{name}"] = tensor
    with refused(*words):
        write(tmp_path, tensors | {"b.weight": numbers.clone(), "b.weight_scale": scale.clone()}, fp8_table())


def test_numbers_of_more_bits_than_said_are_refused(tmp_path: Path) -> None:
    matrix = matrix_of(8, 32, True)
    settings = table(group(weights(symmetric=True)), kind="int-quantized")
    with refused("numbers outside of -8 to 7"):
        write(tmp_path, int8(MODULE, matrix, symmetric=True), settings).read(KEY)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (table(kind="marlin-24"), ('format is "marlin-24"', "pack-quantized")),
        (table(kind="nvfp4-pack-quantized"), ("format is",)),
        (table(group(format="mxfp4-pack-quantized")), ("group_0: format is",)),
        (table(group(), kind="mixed-precision"), ("group_0: format is missing",)),
        (table(quantization_status="frozen"), ("quantization_status",)),
        (table(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}), ("transform_config is set",)),
        (table(sparsity_config={"format": "sparse-24-bitmask"}), ("sparsity_config is set",)),
        (table(moe_sparsity_config={"method": "prune"}), ("moe_sparsity_config is set",)),
        (table(brand_new=1), ("brand_new is set",)),
        (table(group(brand_new=1)), ("group_0: brand_new is set",)),
        (table(group(weights(brand_new=1))), ("weights: brand_new is set",)),
        (table(group(weights(dynamic=True))), ("dynamic is set",)),
        (table(group(weights(num_bits=3))), ("num_bits is 3", "2 and 4 and 8")),
        (table(group(weights(num_bits=4, type="float"))), ("num_bits is 4 of type float",)),
        (table(group(weights(num_bits=8, type="float"))), ("strategy is group of type float",)),
        (table(group(weights(group_size=48))), ("group_size is 48",)),
        (table(group(weights(group_size=-32))), ("group_size is -32",)),
        (table(group(weights(group_size=1 << 70))), ("group_size is",)),
        (table(group(weights(group_size=None))), ("group_size is null",)),
        (table(group(weights(strategy="tensor_group"))), ("strategy is",)),
        (table(group(weights(strategy="block", block_structure=[128, 128]))), ("strategy is block of type int",)),
        (fp8_table("block"), ("block_structure is null",)),
        (table(group(weights(symmetric="yes"))), ("symmetric is",)),
        (table() | {"config_groups": {"W4A16": ["Linear"]}}, ("W4A16 is", "a table")),
        (table(group(None, "LinearBase")), ("leave model.a_proj in full precision",)),
        (table(ignore=[MODULE]), ("leave model.a_proj in full precision",)),
        (table(ignore=["re:.*a_proj"]), ("leave model.a_proj in full precision",)),
        (table(ignore=["re:("]), ("no regular expression",)),
        (table(ignore=["re:" + "a" * 3000]), ("3,000 characters",)),
        (table(ignore="re:.*"), ("ignore is", "a list of texts")),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_change_what_weights_mean_are_refused(
    tmp_path: Path, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused("quantization_config", *words) as refusal:
        write(tmp_path, packed(MODULE, matrix_of(rows=16, columns=64)), settings)
    assert refusal.value.next_step


def test_an_expression_that_never_ends_is_refused(tmp_path: Path) -> None:
    module = f"model.{'a' * 400}_proj"
    start = time.process_time()
    with refused("quantization_config", "takes too long to match names such as 'model.aaa") as refusal:
        write(tmp_path, packed(module, matrix_of(rows=16, columns=64)), table(ignore=[r"re:model\.(?:a|aa)+\Z"]))
    assert "repetitions" in refusal.value.next_step
    assert time.process_time() - start < 20


def test_an_older_key_of_the_table_is_read_too(tmp_path: Path) -> None:
    matrix = matrix_of()
    checkpoint = write(tmp_path, packed(MODULE, matrix), table(), key="compression_config")
    assert torch.equal(checkpoint.read(KEY).double(), matrix.weight)


def test_two_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    matrix = matrix_of()
    (tmp_path / "quantization_config.json").write_text(json.dumps(table(version="0.9")), encoding="utf-8")
    assert torch.equal(write(tmp_path, packed(MODULE, matrix), table()).read(KEY).double(), matrix.weight)
    (tmp_path / "quantization_config.json").write_text(json.dumps(table(ignore=[])), encoding="utf-8")
    with refused("config.json: quantization_config and", "quantization_config.json say different things"):
        Checkpoint.open(tmp_path)
