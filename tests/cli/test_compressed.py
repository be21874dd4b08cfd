"""Checkpoints of compressed-tensors and AWQ through the command line: what is kept, dequantized, told and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import TARGET, Run, build, bundle_weights, small_checkpoint, write_recipe
from compressed_files import Tensors, awq, awq_table, fp8, fp8_table, group, packed, rewrite, rounded_to_bf16, table
from compressed_files import weights as arguments
from gptq_files import Matrix
from models import MIXTURE, write_predicting
from safetensors.torch import load_file
from test_bad_input import check

import glmexport.workflows.build
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import EXIT_INPUT

GATE_UP = "mlp.gate_up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full precision."""
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    small_checkpoint(directory)
    return directory


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles without their validation, where only what they hold is of interest."""
    monkeypatch.setattr(glmexport.workflows.build, "measure_and_report", lambda *_: None)


class Codes:
    """Random codes for every linear, in one layout; gate and up are two matrices there."""

    def __init__(self, layout: str, bits: int = 4, group_size: int = 32, symmetric: bool = False) -> None:
        self.layout, self.bits, self.group_size, self.symmetric = layout, bits, group_size, symmetric
        self.matrices: dict[str, Matrix] = {}

    @property
    def table(self) -> dict[str, Any]:
        if self.layout == "awq":
            return awq_table(group_size=self.group_size)
        strategy = "channel" if self.group_size == -1 else "group"
        form = arguments(
            num_bits=self.bits, group_size=self.group_size, strategy=strategy, symmetric=self.symmetric
        )
        return table(group(form))

    def __call__(self, module: str, tensor: torch.Tensor) -> Tensors:
        rows, columns = tensor.shape
        seed = len(self.matrices)
        matrix = rounded_to_bf16(Matrix.random(rows, columns, self.bits, self.group_size, self.symmetric, seed))
        self.matrices[f"{module}.weight"] = matrix
        halves = {module: matrix}
        if module.endswith(GATE_UP):
            half, prefix = rows // 2, module.removesuffix("gate_up_proj")
            halves = {f"{prefix}gate_proj": matrix.rows(0, half), f"{prefix}up_proj": matrix.rows(half, rows)}
        written: Tensors = {}
        for name, part in halves.items():
            written |= awq(name, part) if self.layout == "awq" else packed(name, part, symmetric=self.symmetric)
        return written


@pytest.mark.parametrize(
    ("codes", "label"),
    [
        (Codes("packed"), "w4g32"),
        (Codes("packed", 8, -1, True), "w8row-sym"),
        (Codes("packed", 4, 128, True), "w4g128-sym"),
        (Codes("awq"), "w4g32"),
    ],
    ids=["w4g32", "w8row-sym", "w4g128-sym", "awq"],
)
def test_a_bundle_keeps_every_code(
    source: Path, tmp_path: Path, quick: None, run: Run, codes: Codes, label: str
) -> None:
    written = rewrite(source, tmp_path / "checkpoint", codes, codes.table)
    (built,) = build(written, tmp_path / "bundle", "stored")
    weights = bundle_weights(built.directory, written)
    for key, matrix in codes.matrices.items():
        linear = weights.quantized(key)
        assert linear is not None and linear.form.bits == codes.bits
        groups = matrix.groups[torch.arange(0, matrix.codes.shape[1], linear.form.group_size)]
        assert torch.equal(linear.codes.long(), matrix.codes)
        assert torch.equal(linear.scales, matrix.scales[:, groups])
        assert torch.equal(linear.dequantize().double(), matrix.weight)
    outcome = run("inspect", written, "--json")
    method = "awq" if codes.layout == "awq" else "compressed-tensors"
    assert outcome.document["quantization"] == {"method": method, "matrices": {label: len(codes.matrices)}}
    assert {row["recipe"] for row in outcome.document["estimates"]} == {"stored"}
    check(run("inspect", written, "--recipe", "rtn-w4g32"), EXIT_INPUT, "quantized already", f"({method}, ")


def test_codes_whose_scales_fp16_does_not_hold_are_rounded_again_only_where_that_is_asked_for(
    source: Path, tmp_path: Path, quick: None, run: Run
) -> None:
    codes = Codes("packed")

    def with_a_small_scale(module: str, tensor: torch.Tensor) -> Tensors:
        return {
            key: each * 0 + 3e-9 if key.endswith("layers.1.self_attn.o_proj.weight_scale") else each
            for key, each in codes(module, tensor).items()
        }

    written = rewrite(source, tmp_path / "checkpoint", with_a_small_scale, codes.table)
    words = ("o_proj.weight_scale is BF16 and has 2.99", "which fp16 does not hold", "--recipe", "full-precision")
    check(run("inspect", written), EXIT_INPUT, *words)
    check(run("build", written, "--target", TARGET, "-o", tmp_path / "bundle"), EXIT_INPUT, *words)
    check(run("inspect", written, "--recipe", "stored"), EXIT_INPUT, *words)
    document = run("inspect", written, "--recipe", "rtn-w4g32", "--json").document
    assert document["quantization"]["matrices"] == {"w4g32": len(codes.matrices)}
    (built,) = build(written, tmp_path / "bundle", "rtn-w4g32")
    linear = bundle_weights(built.directory, written).quantized("model.layers.0.self_attn.o_proj.weight")
    wanted = codes.matrices["model.layers.0.self_attn.o_proj.weight"].weight
    assert linear is not None
    # Another rounding of the same matrix, and not its codes.
    assert float((linear.dequantize() - wanted).abs().max()) < 0.03 and not torch.equal(linear.dequantize(), wanted)


@pytest.mark.parametrize("drafting", ["stored in fp8", "left as it is"])
def test_fp8_as_published_is_built_from_and_judged_by_what_its_numbers_stand_for(
    tmp_path: Path, run: Run, drafting: str
) -> None:
    write_predicting(tmp_path / "source", "glm4_moe", **MIXTURE, num_hidden_layers=2)
    wanted: Tensors = {}

    def scaled(module: str, tensor: torch.Tensor) -> Tensors | None:
        # An expert of a stack is a matrix of its own there, and so it is here.
        if drafting == "left as it is" and "layers.2." in module:
            return None
        numbers, scale = fp8(tensor.float(), "channel")
        wanted[f"{module}.weight"] = numbers.float() * scale.float()
        return {f"{module}.weight": numbers, f"{module}.weight_scale": scale}

    ignore = ["lm_head", "model.layers.1.mlp.gate", "model.layers.2.eh_proj", "re:.*embed_tokens"]
    written = rewrite(tmp_path / "source", tmp_path / "checkpoint", scaled, fp8_table(ignore=ignore))
    opened = Checkpoint.open(written)
    assert wanted and all(torch.equal(opened.read(key), matrix) for key, matrix in wanted.items())
    document = run("inspect", written, "--json").document
    assert document["quantization"]["method"] == "compressed-tensors"
    assert set(document["quantization"]["matrices"]) == {"fp8-row"} and "F8_E4M3" in document["dtypes"]
    assert "input_activations quantize what a server computes" in " ".join(run("inspect", written).stderr.split())
    # Names and parameters are those of the checkpoint in full precision.
    assert document["parameters"] == run("inspect", tmp_path / "source", "--json").document["parameters"]
    (built,) = build(written, tmp_path / "bundle", write_recipe(tmp_path))
    assert built.report.fidelity.overall.kl_mean_nats < 0.05
    assert built.report.weights is not None and not built.report.weights.faults
    assert "compressed-tensors" in str(built.report.performance.original_absent_because)


def test_what_is_not_read_is_refused_by_every_command(source: Path, tmp_path: Path, run: Run) -> None:
    codes = Codes("packed")
    written = rewrite(source, tmp_path / "checkpoint", codes, codes.table | {"transform_config": {"R1": {}}})
    for command in (
        ("inspect", written),
        ("build", written, "--target", TARGET, "-o", tmp_path / "bundle"),
        ("reference", written, "-o", tmp_path / "reference"),
    ):
        check(run(*command), EXIT_INPUT, "config.json: quantization_config: transform_config is set", "full-precision")
    assert not (tmp_path / "bundle").exists() and not (tmp_path / "reference").exists()


def test_both_halves_of_one_matrix_may_be_stored_in_their_own_way_where_nothing_is_kept(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")

    def one_half(module: str, tensor: torch.Tensor) -> Tensors | None:
        if not module.endswith(f"layers.0.{GATE_UP}"):
            return None
        gate, up = tensor.float().chunk(2)
        numbers, scale = fp8(gate, "channel")
        prefix = module.removesuffix("gate_up_proj")
        return {
            f"{prefix}gate_proj.weight": numbers,
            f"{prefix}gate_proj.weight_scale": scale,
            f"{prefix}up_proj.weight": up.bfloat16(),
        }

    written = rewrite(tmp_path / "source", tmp_path / "checkpoint", one_half, fp8_table())
    key = f"model.layers.0.{GATE_UP}.weight"
    opened = Checkpoint.open(written).stacked(
        {key: (key.replace("gate_up", "gate"), key.replace("gate_up", "up"))}
    )
    half = weights[key].shape[0] // 2
    assert torch.equal(opened.read(key)[half:], weights[key][half:].float())
    assert json.loads((written / "config.json").read_text())["quantization_config"]["format"] == "float-quantized"
