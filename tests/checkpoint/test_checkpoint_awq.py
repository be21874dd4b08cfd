"""Matrices in AWQ's layout: what they are read as, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import write_checkpoint
from compressed_files import awq, awq_table
from gptq_files import Matrix

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError

MODULE = "model.a_proj"
KEY = f"{MODULE}.weight"


def write(directory: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any] | None) -> Checkpoint:
    config: dict[str, object] = {"model_type": "glm4"} | ({"quantization_config": settings} if settings else {})
    write_checkpoint(directory, {"model.safetensors": {**tensors, "norm": torch.ones(3)}}, config=config)
    return Checkpoint.open(directory)


def refused(*words: str) -> Any:
    return pytest.raises(CheckpointError, match=".*".join(words))


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 384, -1])
def test_a_matrix_is_read_code_by_code(tmp_path: Path, group_size: int) -> None:
    matrix = Matrix.random(40, 768, 4, group_size, False)
    checkpoint = write(tmp_path, awq(MODULE, matrix), awq_table(group_size=group_size))
    assert torch.equal(checkpoint.read(KEY).double(), matrix.weight)
    assert torch.equal(checkpoint.rows(KEY, 3, 17).double(), matrix.weight[3:17])
    codes = checkpoint.codes(KEY, 5, 40)
    form = checkpoint.quantized[KEY].exact
    groups = torch.arange(0, 768, form.group_size)
    assert torch.equal(codes.codes.long(), matrix.codes[5:])
    assert torch.equal(codes.scales, matrix.scales[5:, matrix.groups[groups]])
    assert torch.equal(codes.zero_points.long(), matrix.zero_points[5:, matrix.groups[groups]])
    assert set(checkpoint.tensors) == {KEY, "norm"} and checkpoint.tensors[KEY].dtype == "AWQ"
    assert checkpoint.stored.layout == "AWQ"


def test_a_word_is_taken_apart_as_the_layout_says(tmp_path: Path) -> None:
    # 0x76543210 holds 0 in its lowest bits: outputs 0, 2, 4, 6, 1, 3, 5, 7 have the codes 0 to 7.
    tensors = {
        f"{MODULE}.qweight": torch.full((16, 1), 0x76543210, dtype=torch.int32),
        f"{MODULE}.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        f"{MODULE}.scales": torch.ones(1, 8).half(),
    }
    checkpoint = write(tmp_path, tensors, awq_table(group_size=16))
    assert checkpoint.read(KEY)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM", "quant_method": "awq"},
        {"bits": 4, "group_size": 32, "sym": False, "quant_method": "awq", "format": "gemm"},
    ],
)
def test_other_spellings_of_the_settings_are_read(tmp_path: Path, settings: dict[str, Any]) -> None:
    matrix = Matrix.random(16, 64, 4, 32, False)
    assert torch.equal(write(tmp_path, awq(MODULE, matrix), settings).read(KEY).double(), matrix.weight)


def test_the_settings_may_be_in_a_file_beside_the_configuration(tmp_path: Path) -> None:
    matrix = Matrix.random(16, 64, 4, 32, False)
    (tmp_path / "quant_config.json").write_text(json.dumps(awq_table()), encoding="utf-8")
    checkpoint = write(tmp_path, awq(MODULE, matrix), None)
    assert torch.equal(checkpoint.read(KEY).double(), matrix.weight)
    digest = checkpoint.digest()
    (tmp_path / "quant_config.json").write_text(json.dumps(awq_table(zero_point=True, note="")), encoding="utf-8")
    with refused("quant_config.json has changed"):
        checkpoint.refuse_changes()
    assert Checkpoint.open(tmp_path).digest() != digest
    with refused("config.json: quantization_config says w4g64, and", "quant_config.json says w4g32"):
        write(tmp_path, awq(MODULE, matrix), awq_table(group_size=64))


@pytest.mark.parametrize("with_points", [True, False])
def test_symmetric_matrices_are_read_with_their_zero_points_and_without(tmp_path: Path, with_points: bool) -> None:
    matrix = Matrix.random(16, 64, 4, 32, True)
    checkpoint = write(tmp_path, awq(MODULE, matrix, symmetric=not with_points), awq_table(zero_point=False))
    assert torch.equal(checkpoint.read(KEY).double(), matrix.weight)
    assert checkpoint.labels == {KEY: "w4g32-sym"}


def test_zero_points_that_are_not_symmetric_are_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, awq(MODULE, Matrix.random(16, 64, 4, 32, False)), awq_table(zero_point=False))
    with refused("says zero_point false", "other than 8"):
        checkpoint.read(KEY)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("qzeros", None, ("has qweight and no qzeros",)),
        ("scales", None, ("has qweight and no scales",)),
        ("weight", torch.ones(16, 64), ("twice",)),
        ("qweight", torch.zeros(64, dtype=torch.int32), ("a matrix of I32",)),
        ("qweight", torch.zeros(64, 2, dtype=torch.int64), ("I64",)),
        ("qweight", torch.zeros(63, 2, dtype=torch.int32), ("groups of 32 divide",)),
        ("qweight", torch.zeros(64, 3, dtype=torch.int32), ("groups of 32",)),
        ("qzeros", torch.zeros(3, 2, dtype=torch.int32), ("qzeros", r"\[3, 2\]", r"\[2, 2\]")),
        ("scales", torch.ones(2, 17).half(), ("scales", r"\[2, 17\]", r"\[2, 16\]")),
    ],
)
def test_wrong_tensors_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, words: tuple[str, ...]
) -> None:
    tensors = awq(MODULE, Matrix.random(16, 64, 4, 32, False))
    tensors.pop(f"{MODULE}.{name}", None)
    if tensor is not None:
        tensors[f"{MODULE}.{name}"] = tensor
    with refused(*words):
        write(tmp_path, tensors, awq_table())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "gemv"}, ("version is gemv", "accepted is gemm")),
        ({"version": "marlin"}, ("version is marlin",)),
        ({"format": "gemv_fast"}, ("version is gemm and gemv_fast",)),
        ({"bits": 8}, ("bits is 8", "accepted is 4")),
        ({"group_size": 48}, ("group_size is 48",)),
        ({"group_size": 0}, ("group_size is 0",)),
        ({"group_size": -2}, ("group_size is -2",)),
        ({"group_size": 1 << 70}, ("group_size is",)),
        ({"zero_point": 1}, ("zero_point is 1",)),
        ({"pack_dtype": "int16"}, ("pack_dtype",)),
    ],
)
def test_formats_without_an_exact_counterpart_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused("quantization_config", *words) as refusal:
        write(tmp_path, awq(MODULE, Matrix.random(16, 64, 4, 32, False)), awq_table(**changes))
    assert refusal.value.next_step


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    matrix = Matrix.random(16, 64, 4, 32, False)
    matrix.scales[3, 1] = float("nan")
    with refused("scales", "not finite"):
        write(tmp_path, awq(MODULE, matrix), awq_table()).read(KEY)
