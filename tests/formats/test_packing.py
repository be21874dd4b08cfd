"""Codes into bytes and back, and the same numbers out of ONNX Runtime's own kernels."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import EVERY_FORM, random_linear
from onnx import TensorProto, helper, numpy_helper

from glmexport.formats.codecs import stored_bits
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format

forms = st.sampled_from(EVERY_FORM)
form_cases = pytest.mark.parametrize("form", EVERY_FORM, ids=lambda form: form.label)


def same(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    if one.zero_points is None or other.zero_points is None:
        points = one.zero_points is other.zero_points
    else:
        points = torch.equal(one.zero_points, other.zero_points)
    same_codes, same_scales = torch.equal(one.codes, other.codes), torch.equal(one.scales, other.scales)
    return points and one.form == other.form and same_codes and same_scales


@given(form=forms, rows=st.integers(1, 5), size=st.integers(1, 300), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_packing_round_trip(form: Format, rows: int, size: int, seed: int) -> None:
    linear = random_linear(rows, size, form, seed)
    packed = linear.pack()
    codes, zero_points = packed["codes"], packed.get("zero_points")
    assert codes.shape == (rows, linear.groups, form.group_size * form.bits // 8)
    assert (zero_points is None) == form.symmetric
    assert same(QuantizedLinear.unpack(form, packed, size), linear)
    size_in_bytes = codes.numel() + linear.scales.numel() * 2 + (0 if zero_points is None else zero_points.numel())
    assert linear.stored_bits == stored_bits((rows, size), form) == size_in_bytes * 8


def test_the_first_code_is_in_the_low_half() -> None:
    form = Format(bits=4, group_size=16)
    codes = torch.arange(48, dtype=torch.uint8).remainder(16)[None]
    linear = QuantizedLinear(form, codes, torch.ones(1, 3).half(), torch.tensor([[3, 9, 5]], dtype=torch.uint8))
    assert linear.pack()["codes"][0, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    zero_points = linear.pack().get("zero_points")
    assert zero_points is not None
    assert zero_points.tolist() == [[0x93, 0x05]]


def test_padding_decodes_to_zero() -> None:
    """Whatever a kernel multiplies the padding with, it adds nothing."""
    codes = torch.ones(1, 18, dtype=torch.uint8)
    points = torch.tensor([[4, 7]], dtype=torch.uint8)
    asymmetric = QuantizedLinear(Format(bits=4, group_size=16), codes, torch.ones(1, 2).half(), points)
    assert asymmetric.pack()["codes"][0, 1].tolist() == [0x11] + [0x77] * 7
    symmetric = QuantizedLinear(Format(bits=8, group_size=16, symmetric=True), codes, torch.ones(1, 2).half(), None)
    assert symmetric.pack()["codes"][0, 1].tolist() == [1, 1] + [128] * 14


def run_node(node: onnx.NodeProto, weights: dict[str, np.ndarray], feed: np.ndarray) -> np.ndarray:
    given_type = TensorProto.FLOAT if feed.dtype == np.float32 else TensorProto.INT64
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info("X", given_type, feed.shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"X": feed})[0]


@form_cases
@pytest.mark.parametrize("size", [384, 200])
@pytest.mark.parametrize("tokens", [1, 7])
def test_matmul_nbits_multiplies_by_the_dequantized_matrix(form: Format, size: int, tokens: int) -> None:
    linear = random_linear(24, size, form)
    weights = {"codes": linear.pack()["codes"].numpy(), "scales": linear.scales.float().numpy()}
    zero_points = linear.pack().get("zero_points")
    if zero_points is not None:
        weights["zero_points"] = zero_points.numpy()
    node = helper.make_node(
        "MatMulNBits",
        ["X", *weights],
        ["Y"],
        domain="com.microsoft",
        K=size,
        N=24,
        bits=form.bits,
        block_size=form.group_size,
        accuracy_level=0,
    )
    inputs = np.random.default_rng(0).standard_normal((tokens, size), dtype=np.float32)
    expected = inputs.astype(np.float64) @ linear.dequantize().double().numpy().T
    found = run_node(node, weights, inputs)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@form_cases
def test_gather_block_quantized_reads_the_dequantized_rows(form: Format) -> None:
    linear = random_linear(20, 512 + 256, form)
    zero_points = linear.pack().get("zero_points")
    if zero_points is None:
        middle = {2: 0xAA, 4: 0x88, 8: 0x80}[form.bits]
        zero_points = torch.full((20, -(-linear.groups * form.bits // 8)), middle)
    weights = {
        "codes": linear.pack()["codes"].flatten(1).numpy(),
        "scales": linear.scales.float().numpy(),
        "zero_points": zero_points.to(torch.uint8).numpy(),
    }
    node = helper.make_node(
        "GatherBlockQuantized",
        ["codes", "X", "scales", "zero_points"],
        ["Y"],
        domain="com.microsoft",
        bits=form.bits,
        block_size=form.group_size,
        gather_axis=0,
        quantize_axis=1,
    )
    ids = np.array([[0, 19, 3], [7, 7, 1]])
    found = run_node(node, weights, ids)
    np.testing.assert_allclose(found, linear.dequantize()[torch.from_numpy(ids)].numpy(), rtol=1e-6)


def test_concatenated_rows_keep_their_values() -> None:
    for form in EVERY_FORM[:2]:
        parts = [random_linear(rows, 40, form, rows) for rows in (3, 5)]
        whole = QuantizedLinear.concatenate(parts)
        assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
        assert torch.equal(whole.rows(2, 6), whole.dequantize()[2:6])
