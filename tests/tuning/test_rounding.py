"""Weights that are rounded when they are asked for are those that a build without calibration writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builds import build, bundle_weights, small_checkpoint
from gptq_files import quantize

from glmexport.formats.packing import unpack
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import STORED, open_recipe
from glmexport.quantization.nearest import round_to_nearest
from glmexport.tuning.rounding import RoundedWeights
from glmexport.workflows.original import Original

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rounding") / "checkpoint"
    small_checkpoint(directory)
    return directory


def rounded(checkpoint: Path, recipe: str, *, searched: bool = False) -> RoundedWeights:
    original = Original.open(str(checkpoint), Silent())
    return RoundedWeights(original.checkpoint, original.architecture, open_recipe(recipe), searched=searched)


def test_as_a_build_rounds(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "bundle", "rtn-w4g32")
    built, weights = bundle_weights(tmp_path / "bundle", checkpoint), rounded(checkpoint, "rtn-w4g32")
    assert len(built.quantized_keys) == 2 * 6 + 2
    for key in built.quantized_keys:
        theirs, ours = built.quantized(key), weights.quantized(key)
        assert theirs is not None and weights.form(key) == theirs.form == ours.form
        assert torch.equal(theirs.codes, ours.codes) and torch.equal(theirs.scales, ours.scales)
    for key in built.other_keys:
        assert weights.form(key) is None


def test_searched(checkpoint: Path) -> None:
    weights = rounded(checkpoint, "w4g32", searched=True)
    matrix, form = weights.tensor(DOWN), weights.form(DOWN)
    assert form is not None
    searched = round_to_nearest(matrix, form, torch.ones(matrix.shape[1]))
    assert torch.equal(weights.quantized(DOWN).codes, searched.codes)
    plain = rounded(checkpoint, "w4g32").quantized(DOWN).dequantize()
    assert (searched.dequantize() - matrix).square().sum() < (plain - matrix).square().sum()


def test_packed_matrices_are_stacked(checkpoint: Path) -> None:
    weights = rounded(checkpoint, "w4g128-sym")
    keys = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    form = weights.form(keys[0])
    assert form is not None and form.symmetric
    codes, scales = weights.packed(keys, "codes"), weights.packed(keys, "scales")
    # 4 heads and 2 key and value heads of 32 rows.
    assert codes.shape[0] == scales.shape[0] == (4 + 2 + 2) * 32
    first = unpack(form, 128, codes[:128], scales[:128], None)
    assert torch.equal(first.codes, weights.quantized(keys[0]).codes)
    asymmetric = rounded(checkpoint, "w4g32")
    assert asymmetric.packed(keys, "zero_points").shape[0] == 256


def test_stored_codes_stay(checkpoint: Path, tmp_path: Path) -> None:
    written = quantize(checkpoint, tmp_path / "gptq")
    weights = rounded(written.directory, STORED)
    for key, matrix in written.matrices.items():
        linear = weights.quantized(key)
        assert torch.equal(linear.codes, matrix.codes.to(torch.uint8))
    architecture = weights.architecture
    assert weights.form(architecture.embedding) is not None
    assert weights.form("model.norm.weight") is None
