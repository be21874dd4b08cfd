"""NF4, the codec beside the affine one: by hand, against the operator, and through a whole build."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from builds import RECIPE, build, bundle_weights, small_checkpoint, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import correlated, generator, relative_error, weights
from models import TINY, write_checkpoint
from onnx import helper
from test_packing import run_node
from torch import Tensor

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import read_manifest
from glmexport.engine.scoring import ScoringSession
from glmexport.formats.codecs import codec_of, stored_bits
from glmexport.formats.nearest import round_to_nearest
from glmexport.formats.normal_float import LEVELS
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Format, Solver, open_recipe
from glmexport.foundation.target import open_target
from glmexport.quantization.problem import Problem
from glmexport.quantization.solve import gptq
from glmexport.report.document import read_report
from glmexport.results.record import Verdict
from glmexport.workflows.checks import refuse_formats
from glmexport.workflows.job import Job
from glmexport.workflows.original import Original

NF4 = Format(bits=4, group_size=32, codec="nf4")


def naive(codes: Tensor, scales: Tensor, size: int) -> Tensor:
    """Level times scale, number by number."""
    matrix = torch.empty(codes.shape)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            matrix[row, column] = LEVELS[int(codes[row, column])] * float(scales[row, column // size])
    return matrix


def random_matrix(rows: int, columns: int, form: Format, seed: int) -> QuantizedLinear:
    random = generator(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    scales = torch.rand(rows, columns // form.group_size, generator=random) - 0.5
    return QuantizedLinear(form, codes, scales.half(), None)


def test_by_hand() -> None:
    """The ends of the range, zero, and what lies nearest between them."""
    form = Format(bits=4, group_size=16, codec="nf4")
    row = torch.tensor([[-2.0, 2.0, 0.0, 1.0, 0.15, -0.01, 1.9, -1.9, *[0.0] * 8]])
    linear = round_to_nearest(row, form)
    assert linear.scales.tolist() == [[2.0]] and linear.zero_points is None
    assert linear.codes[0, :8].tolist() == [0, 15, 7, 12, 8, 7, 15, 0]
    assert linear.dequantize()[0, :3].tolist() == [-2.0, 2.0, 0.0]
    # The first of two codes is in the high half of a byte.
    assert linear.pack()["codes"][0, :2].tolist() == [0x0F, 0x7C]
    assert stored_bits((1, 16), form) == linear.stored_bits == 16 * 4 + 16


@given(rows=st.integers(1, 5), groups=st.integers(1, 6), size=st.sampled_from([16, 32, 64]), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_packing_round_trip(rows: int, groups: int, size: int, seed: int) -> None:
    form = Format.model_validate({"bits": 4, "group_size": size, "codec": "nf4"})
    linear = random_matrix(rows, groups * size, form, seed)
    packed = linear.pack()
    assert set(packed) == set(codec_of(form).parts)
    assert sum(8 * part.nbytes for part in packed.values()) == linear.stored_bits
    found = QuantizedLinear.unpack(form, packed, groups * size)
    assert torch.equal(found.codes, linear.codes) and torch.equal(found.scales, linear.scales)
    assert torch.equal(found.dequantize(), naive(linear.codes, linear.scales, size))


@given(seed=st.integers(0, 1000), searched=st.booleans())
@settings(deadline=None, max_examples=40)
def test_every_weight_has_the_nearest_level_and_the_search_loses_nothing(seed: int, searched: bool) -> None:
    weight = weights(3, 64, seed)
    importance = torch.rand(64, generator=generator(seed)) + 0.1
    linear = round_to_nearest(weight, NF4, importance if searched else None)
    for row in range(3):
        for column in range(64):
            values = [float(linear.scales[row, column // 32]) * level for level in LEVELS]
            nearest = min(abs(value - float(weight[row, column])) for value in values)
            assert abs(float(linear.dequantize()[row, column] - weight[row, column])) <= nearest + 1e-7
    plain = round_to_nearest(weight, NF4)

    def error(found: QuantizedLinear) -> Tensor:
        return (found.dequantize() - weight).square() @ importance

    assert not searched or bool((error(linear) <= error(plain) * (1 + 1e-5)).all())


def test_a_grid_names_its_levels() -> None:
    grid = codec_of(NF4).fit(torch.randn(32, 5, generator=generator(0)), None)
    codes = torch.arange(16, dtype=torch.uint8)[:, None].expand(16, 5)
    assert torch.equal(grid.codes(grid.levels(codes)), codes)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    exact = grid.levels(codes).clone()
    assert torch.equal(grid.nearest_(exact.clone()), exact)


def test_the_operator_multiplies_by_the_dequantized_matrix() -> None:
    linear = random_matrix(24, 96, NF4, 0)
    packed = linear.pack()
    node = helper.make_node(
        "MatMulBnb4", ["X", "codes", "scales"], ["Y"], domain="com.microsoft", K=96, N=24, block_size=32, quant_type=1
    )
    inputs = np.random.default_rng(0).standard_normal((5, 96), dtype=np.float32)
    found = run_node(
        node, {"codes": packed["codes"].flatten().numpy(), "scales": packed["scales"].float().flatten().numpy()}, inputs
    )
    expected = inputs.astype(np.float64) @ naive(linear.codes, linear.scales, 32).double().numpy().T
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_why_there_are_no_three_bits(bits: int) -> None:
    """The day this fails, the runtime has kernels of so many bits, and a codec can have them."""
    node = helper.make_node(
        "MatMulNBits", ["X", "codes", "scales"], ["Y"], domain="com.microsoft", K=32, N=8, bits=bits, block_size=32
    )
    arrays = {"codes": np.zeros((8, 1, 4 * bits), np.uint8), "scales": np.ones((8, 1), np.float32)}
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="Only 2b, 4b and 8b"):
        run_node(node, arrays, np.zeros((1, 32), np.float32))


def test_the_solver_serves_it_as_it_serves_the_other() -> None:
    """Compensated and polished, it misses far less than rounded to nearest, and no row is worse."""
    weight, hessian = weights(64, 128), correlated(128)
    solver = Solver(polish_rounds=2)
    problem = Problem.prepare(hessian.clone(), NF4, solver)
    solution = gptq([weight], problem, NF4, solver)
    nearest = round_to_nearest(weight, NF4, problem.importance)
    assert relative_error(weight, solution.linear, hessian) < 0.6 * relative_error(weight, nearest, hessian)
    plain = Solver(polish_rounds=0)
    swept = gptq([weight], Problem.prepare(hessian.clone(), NF4, plain), NF4, plain)
    assert solution.relative_error <= swept.relative_error


@pytest.mark.parametrize("values", [{"bits": 8}, {"bits": 4, "symmetric": True}])
def test_a_format_that_the_codec_has_not_is_an_error(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="codec nf4"):
        Format.model_validate({"group_size": 32, "codec": "nf4", **values})


def test_what_cannot_be_stored_so_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "glm4", **TINY["glm4"])
    original = Original.open(str(tmp_path), Silent())
    recipe = open_recipe("w4g32").model_copy(update={"linears": NF4})
    refuse_formats(original, Job(open_target("x86-avx2"), recipe, tmp_path))
    wide = NF4.model_copy(update={"group_size": 256})
    for target, changes, reason in (
        ("arm64", {}, "has no kernels"),
        ("x86-avx2", {"embedding": NF4}, "no rows can be looked up"),
        ("x86-avx2", {"linears": wide}, "no whole groups"),
    ):
        with pytest.raises(InputError, match=reason):
            refuse_formats(original, Job(open_target(target), recipe.model_copy(update=changes), tmp_path))


def test_a_build_from_recipe_to_answer(tmp_path: Path) -> None:
    """The bundle computes with the very matrices that its bytes stand for, decoded here one number at a time."""
    model = small_checkpoint(tmp_path / "checkpoint")
    text = RECIPE.replace("[linears]\nbits = 4", '[linears]\ncodec = "nf4"\nbits = 4')
    text = text.replace("[lm_head]\nbits = 8", '[lm_head]\ncodec = "nf4"\nbits = 4')
    recipe = write_recipe(tmp_path, text.replace("[solver]", "[solver]\nfold_scales = false"), "nf4")
    (built,) = build(tmp_path / "checkpoint", tmp_path / "bundle", recipe)
    manifest = read_manifest(built.directory)
    labels = {matrix.part: matrix.codec for matrix in manifest.matrices}
    assert labels == dict.fromkeys(("qkv", "o", "gate_up", "down", "lm_head"), "nf4") | {"embedding": "affine"}
    assert manifest.tensors is not None
    assert {tensor.format.label for tensor in manifest.tensors} == {"nf4g32", "w8g32"}
    report = read_report(built.directory / "report.json")
    weight_gates = [gate for gate in report.gates if "atrices" in gate.name or "weights" in gate.name.lower()]
    assert weight_gates and all(gate.verdict is Verdict.PASS for gate in weight_gates)
    stored = bundle_weights(built.directory, tmp_path / "checkpoint")
    state = model.state_dict()
    for key in stored.quantized_keys:
        linear = stored.quantized(key)
        assert linear is not None
        matrix = naive(linear.codes, linear.scales, 32) if linear.form.codec == "nf4" else linear.dequantize()
        state[key].copy_(matrix)
    ids = torch.tensor([[3, 5, 7, 11, 13, 17, 19, 23]])
    with torch.no_grad():
        expected = model(ids).logits[0]
    logits = torch.as_tensor(ScoringSession(Bundle.open(built.directory), 1).logits(ids[0]))
    assert float((logits - expected).abs().max()) < 1e-3 * float(expected.abs().max())
