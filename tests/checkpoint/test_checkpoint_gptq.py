"""Matrices in the GPTQ format: what they are read as, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import write_checkpoint
from gptq_files import QUANTIZE_CONFIG, Matrix, settings
from safetensors.torch import load_file, save_file

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError

MODULE = "model.a_proj"
KEY = f"{MODULE}.weight"


def write(
    directory: Path,
    matrix: Matrix,
    table: dict[str, Any] | None,
    version: str = "gptq",
    change: Callable[[dict[str, torch.Tensor]], object] | None = None,
    **more: torch.Tensor,
) -> Checkpoint:
    """A checkpoint of one matrix and one vector; ``table`` goes into config.json."""
    tensors = {**matrix.tensors(MODULE, version), "norm": torch.ones(3), **more}
    if change:
        change(tensors)
    config: dict[str, object] = {"model_type": "glm4"} | ({"quantization_config": table} if table else {})
    write_checkpoint(directory, {"model.safetensors": tensors}, config=config)
    return Checkpoint.open(directory)


def refused(*words: str) -> Any:
    return pytest.raises(CheckpointError, match=".*".join(words))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 16), (8, 64), (4, 128), (4, -1), (8, -1), (4, 384)])
def test_a_matrix_is_read_exactly(tmp_path: Path, version: str, symmetric: bool, bits: int, group_size: int) -> None:
    matrix = Matrix.random(40, 768, bits, group_size, symmetric)
    checkpoint = write(
        tmp_path / "c", matrix, settings(bits, group_size, symmetric, checkpoint_format=version), version
    )
    assert torch.equal(checkpoint.read(KEY).double(), matrix.weight)
    assert torch.equal(checkpoint.rows(KEY, 3, 17).double(), matrix.weight[3:17])
    codes = checkpoint.codes(KEY, 5, 40)
    form = checkpoint.quantized[KEY].exact
    groups = torch.arange(0, 768, form.group_size)
    assert torch.equal(codes.codes.long(), matrix.codes[5:])
    assert torch.equal(codes.scales, matrix.scales[5:, matrix.groups[groups]])
    assert torch.equal(codes.zero_points.long(), matrix.zero_points[5:, matrix.groups[groups]])
    assert (form.bits, form.symmetric) == (bits, symmetric)
    assert form.group_size == (group_size if group_size <= 256 and group_size > 0 else 128)


def test_it_is_listed_as_the_weight_that_it_stands_for(tmp_path: Path) -> None:
    matrix = Matrix.random(16, 64, 4, 32, False)
    checkpoint = write(tmp_path / "c", matrix, settings(checkpoint_format="gptq"))
    assert set(checkpoint.tensors) == {KEY, "norm"}
    assert checkpoint.shape(KEY) == (16, 64)
    assert checkpoint.parameters == 16 * 64 + 3
    assert checkpoint.bytes == 16 * 64 // 2 + 2 * 16 // 2 + 2 * 2 * 16 + 4 * 64 + 3 * 4
    assert checkpoint.quantized[KEY].label == "w4g32"
    assert checkpoint.read(KEY, torch.bfloat16).dtype == torch.bfloat16


def test_groups_may_be_left_out_of_the_file(tmp_path: Path) -> None:
    matrix = Matrix.random(16, 64, 4, 32, False)
    checkpoint = write(
        tmp_path / "c", matrix, settings(checkpoint_format="gptq"), change=lambda t: t.pop(f"{MODULE}.g_idx")
    )
    assert torch.equal(checkpoint.read(KEY).double(), matrix.weight)


def test_rows_of_two_matrices_are_read_as_one(tmp_path: Path) -> None:
    matrix = Matrix.random(32, 64, 4, 32, False)
    tensors = matrix.rows(0, 16).tensors("gate", "gptq") | matrix.rows(16, 32).tensors("up", "gptq")
    checkpoint = write(
        tmp_path / "c", Matrix.random(8, 64, 4, 32, False), settings(checkpoint_format="gptq"), **tensors
    ).stacked({"both.weight": ("gate.weight", "up.weight"), "none.weight": ("x.weight", "y.weight")})
    assert set(checkpoint.tensors) == {KEY, "norm", "both.weight"}
    assert torch.equal(checkpoint.read("both.weight").double(), matrix.weight)
    assert torch.equal(checkpoint.rows("both.weight", 10, 20).double(), matrix.weight[10:20])
    assert torch.equal(checkpoint.codes("both.weight", 10, 20).codes.long(), matrix.codes[10:20])


def test_halves_of_different_formats_are_refused(tmp_path: Path) -> None:
    half = Matrix.random(16, 64, 4, 32, False)
    more = half.tensors("gate", "gptq") | {"up.weight": torch.ones(16, 64)}
    checkpoint = write(tmp_path / "c", half, settings(checkpoint_format="gptq"), **more)
    with refused("gate.weight", "up.weight", "full precision and w4g32"):
        checkpoint.stacked({"both.weight": ("gate.weight", "up.weight")})


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_symmetric_zero_points_tell_the_version_where_nothing_else_does(tmp_path: Path, version: str) -> None:
    matrix = Matrix.random(16, 64, 4, 32, True)
    checkpoint = write(tmp_path / "c", matrix, settings(sym=True), version)
    assert torch.equal(checkpoint.read(KEY).double(), matrix.weight)


def test_an_unnamed_version_of_an_asymmetric_checkpoint_is_the_first(tmp_path: Path) -> None:
    matrix = Matrix.random(16, 64, 4, 32, False)
    assert torch.equal(write(tmp_path / "c", matrix, settings()).read(KEY).double(), matrix.weight)


@pytest.mark.parametrize(("said", "stored"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_zero_points_of_the_other_version_are_refused(tmp_path: Path, said: str, stored: str) -> None:
    matrix = Matrix.random(16, 64, 4, 32, True)
    with refused("qzeros stores zero points", rf"\({stored}\)", rf"\({said}\)", "Correct checkpoint_format"):
        write(tmp_path / "c", matrix, settings(sym=True, checkpoint_format=said), stored)


def test_zero_points_that_are_not_symmetric_are_refused(tmp_path: Path) -> None:
    matrix = Matrix.random(16, 64, 4, 32, False)
    with refused("says sym", "zero points other than 8"):
        write(tmp_path / "c", matrix, settings(sym=True, checkpoint_format="gptq"))


def test_reordered_columns_are_refused(tmp_path: Path) -> None:
    matrix = Matrix.random(16, 64, 4, 32, False)
    matrix.groups = matrix.groups[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    with refused("g_idx assigns inputs to groups out of order", "desc_act=False"):
        write(tmp_path / "c", matrix, settings(checkpoint_format="gptq", desc_act=True))


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("qzeros", torch.zeros(3, 2, dtype=torch.int32), ("qzeros", r"\[3, 2\]", r"\[2, 2\]")),
        ("qweight", torch.zeros(9, 16, dtype=torch.int32), ("qweight", r"\[9, 16\]")),
        ("qweight", torch.zeros(8, 16, dtype=torch.int64), ("qweight", "I64")),
        ("qweight", torch.zeros(8, dtype=torch.int32), ("qweight", "two axes")),
        ("scales", torch.ones(2, 16), ("scales", "F32", "F16")),
        ("scales", torch.ones(4, 16).half(), ("scales", "group_size 32")),
        ("g_idx", torch.zeros(65, dtype=torch.int32), ("qweight", "I32")),
        ("qzeros", None, ("has qweight and no qzeros",)),
        ("scales", None, ("has qweight and no scales",)),
        ("weight", torch.ones(16, 64), ("twice",)),
    ],
)
def test_wrong_tensors_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, words: tuple[str, ...]
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(f"{MODULE}.{name}", None)
        if tensor is not None:
            tensors[f"{MODULE}.{name}"] = tensor

    with refused(*words):
        write(tmp_path / "c", Matrix.random(16, 64, 4, 32, False), settings(checkpoint_format="gptq"), change=change)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 3}, ("bits is 3", "4 and 8")),
        ({"bits": 2}, ("bits is 2",)),
        ({"group_size": 48}, ("group_size is 48",)),
        ({"group_size": 0}, ("group_size is 0",)),
        ({"quant_method": "hqq"}, ("quantized by HQQ",)),
        ({"pack_dtype": "int16"}, ("pack_dtype",)),
        ({"checkpoint_format": "marlin"}, ("checkpoint_format",)),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, ("checkpoint_format is gptq and format is gptq_v2",)),
        ({"dynamic": {"-:.*a_proj": {}}}, ("dynamic leaves out model.a_proj",)),
        ({"dynamic": {"(": {}}}, ("no regular expression",)),
        ({"sym": 1}, ("sym is 1",)),
    ],
)
def test_formats_without_an_exact_counterpart_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused("config.json", *words):
        write(tmp_path / "c", Matrix.random(16, 64, 4, 32, False), settings() | changes)


def test_an_override_decides_over_the_whole(tmp_path: Path) -> None:
    matrix = Matrix.random(16, 64, 8, 16, False)
    table = settings(checkpoint_format="gptq", dynamic={"-:other": {}, "+:.*a_proj": {"bits": 8, "group_size": 16}})
    checkpoint = write(tmp_path / "c", matrix, table)
    assert torch.equal(checkpoint.read(KEY).double(), matrix.weight)


class TestTwoFiles:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        write(tmp_path / "c", Matrix.random(16, 64, 4, 32, False), settings(checkpoint_format="gptq"))
        return tmp_path / "c"

    def put(self, directory: Path, **changes: Any) -> None:
        (directory / QUANTIZE_CONFIG).write_text(json.dumps(settings() | changes), encoding="utf-8")

    def test_one_that_says_the_same_changes_nothing_but_the_digest(self, directory: Path) -> None:
        before = Checkpoint.open(directory)
        digest = before.digest()
        self.put(directory, damp_percent=0.1)
        after = Checkpoint.open(directory)
        assert torch.equal(before.read(KEY), after.read(KEY))
        assert digest != after.digest()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"bits": 8}, ("bits 4", "says 8")),
            ({"group_size": 64}, ("group_size 32", "says 64")),
            ({"sym": True}, ("sym false", "says true")),
            ({"checkpoint_format": "gptq_v2"}, ('checkpoint_format "gptq"', 'says "gptq_v2"')),
            ({"dynamic": {"-:x": {}}}, ("dynamic",)),
            ({"quant_method": "awq"}, ("says GPTQ", "quantize_config.json says AWQ")),
            ({"quant_method": "hqq"}, ("quantize_config.json", "HQQ")),
        ],
    )
    def test_a_contradiction_is_refused(self, directory: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
        self.put(directory, **changes)
        with refused(*words):
            Checkpoint.open(directory)

    def test_quantize_config_alone_is_enough(self, directory: Path) -> None:
        matrix = Matrix.random(16, 64, 4, 32, False)
        config = directory / "config.json"
        config.write_text(json.dumps({"model_type": "glm4"}), encoding="utf-8")
        with refused("neither config.json nor quantize_config.json"):
            Checkpoint.open(directory)
        self.put(directory)
        assert torch.equal(Checkpoint.open(directory).read(KEY).double(), matrix.weight)

    def test_settings_without_packed_weights_are_refused(self, directory: Path) -> None:
        save_file({"norm": torch.ones(3)}, directory / "model.safetensors")
        with refused("quantized by gptq, and no tensor is named"):
            Checkpoint.open(directory)


def test_an_adapter_is_not_merged_into_codes(tmp_path: Path) -> None:
    write(tmp_path / "c", Matrix.random(16, 64, 4, 32, False), settings(checkpoint_format="gptq"))
    with refused("is quantized", "cannot take up the adapter", "full-precision checkpoint"):
        Checkpoint.open(tmp_path / "c", adapter=tmp_path / "adapter")


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    matrix = Matrix.random(16, 64, 4, 32, False)
    matrix.scales[3, 1] = float("inf")
    checkpoint = write(tmp_path / "c", matrix, settings(checkpoint_format="gptq"))
    with refused("scales", "not finite"):
        checkpoint.read(KEY)


def test_a_file_that_changed_is_not_read(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", Matrix.random(16, 64, 4, 32, False), settings(checkpoint_format="gptq"))
    path = tmp_path / "c" / "model.safetensors"
    save_file(load_file(path) | {"more": torch.ones(1)}, path)
    with refused("changed since"):
        checkpoint.read(KEY)


def test_an_expression_that_never_ends_is_refused(tmp_path: Path) -> None:
    module = f"model.{'a' * 400}_proj"
    tensors = Matrix.random(16, 64, 4, 32, False).tensors(module, "gptq")
    table = settings(checkpoint_format="gptq", dynamic={r"-:model\.(?:a|aa)+\Z": {}})
    with refused("dynamic", "takes too long to match names"):
        write(tmp_path / "c", Matrix.random(16, 64, 4, 32, False), table, **tensors)
