"""What every codec promises, and the name by which people know its format."""

from __future__ import annotations

import pytest
import torch
from builds import Sample, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import EVERY_FORM, random_linear, weights
from torch import Tensor

from glmexport.bundle.manifest import read_manifest
from glmexport.formats.codecs import codec_of, stored_bits
from glmexport.formats.nearest import nearest_without_text, round_to_nearest
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format
from glmexport.report.allocation import format_label
from glmexport.report.document import LinearResult

__all__ = ["sample"]

NF4 = [Format(bits=4, group_size=size, codec="nf4") for size in (16, 64)]
forms = st.sampled_from([*EVERY_FORM, *NF4])
form_cases = pytest.mark.parametrize("form", [*EVERY_FORM, *NF4], ids=lambda form: form.label)


def naive(linear: QuantizedLinear) -> Tensor:
    """(code - zero point) * scale, number by number."""
    form, matrix = linear.form, torch.empty(linear.codes.shape)
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            group = column // form.group_size
            zero = 2 ** (form.bits - 1) if linear.zero_points is None else int(linear.zero_points[row, group])
            matrix[row, column] = (int(linear.codes[row, column]) - zero) * float(linear.scales[row, group])
    return matrix


@given(form=st.sampled_from(EVERY_FORM), rows=st.integers(1, 3), size=st.integers(1, 80), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_an_affine_matrix_is_code_less_zero_point_times_scale(form: Format, rows: int, size: int, seed: int) -> None:
    linear = random_linear(rows, size, form, seed)
    assert torch.equal(linear.dequantize(), naive(linear))


@given(form=forms, rows=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_what_is_rounded_packs_and_unpacks(form: Format, rows: int, groups: int, seed: int) -> None:
    linear = round_to_nearest(weights(rows, groups * form.group_size, seed), form)
    packed = linear.pack()
    assert tuple(packed) == codec_of(form).parts
    assert all(part.shape[0] == rows for part in packed.values())
    assert sum(8 * part.nbytes for part in packed.values()) == stored_bits((rows, groups * form.group_size), form)
    assert QuantizedLinear.unpack(form, packed, groups * form.group_size).digest() == linear.digest()


@form_cases
def test_a_grid_rounds_as_its_codes_do(form: Format) -> None:
    """What the solver moves, levels, and what is stored, codes, say the same."""
    columns = weights(5, form.group_size).T.contiguous()
    codec = codec_of(form)
    for importance in (None, torch.ones(form.group_size)):
        grid = codec.fit(columns, importance)
        codes = grid.encode(columns)
        levels = grid.nearest_(columns / grid.scale)
        assert torch.equal(grid.codes(levels), codes) and torch.equal(grid.levels(codes), levels)
        torch.testing.assert_close(levels * grid.scale, grid.decode(codes), rtol=1e-6, atol=0)
        again = codec.grid(grid.scale, grid.zero_point)
        assert torch.equal(again.decode(codes), grid.decode(codes))
        assert float(levels.abs().max()) <= max(codec.reach, 2**form.bits - 1)


@form_cases
def test_a_step_is_what_two_neighbours_are_apart(form: Format) -> None:
    linear = round_to_nearest(weights(3, form.group_size), form)
    grid = codec_of(form).grid(linear.scales[:, 0].float(), torch.zeros(3))
    every = torch.arange(2**form.bits, dtype=torch.uint8)[:, None].expand(-1, 3)
    apart = grid.decode(every).diff(dim=0).mean(0)
    torch.testing.assert_close(linear.steps(0, 3)[:, 0], apart, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_search_is_left_out_where_it_gains_nothing(bits: int) -> None:
    form = Format.model_validate({"bits": bits, "group_size": 32})
    weight = weights(4, 64)
    found = nearest_without_text(weight, form, searched=True)
    searched = round_to_nearest(weight, form, torch.ones(64))
    assert (found.digest() == searched.digest()) == codec_of(form).searched == (bits < 8)
    assert nearest_without_text(weight, form, searched=False).digest() == round_to_nearest(weight, form).digest()


@form_cases
def test_the_report_names_the_format_that_the_codec_has(form: Format) -> None:
    """A format's label and what a report says of it tell the same formats apart."""
    record = LinearResult(
        name="a", layer=0, part="o", bits=form.bits, group_size=form.group_size, symmetric=form.symmetric,
        codec=form.codec, bits_per_weight=4.5, relative_error=0.1, round_to_nearest_error=0.2, damping=0.01,
        dead_columns=0, effective_tokens_per_column=None,
    )  # fmt: skip
    symmetry = "symmetric" if form.symmetric else "asymmetric"
    expected = {
        "affine": f"{form.bits} bit, groups of {form.group_size}, {symmetry}",
        "nf4": f"NF4, groups of {form.group_size}",
    }
    assert format_label(record) == expected[form.codec]
    labels = {
        "affine": f"w{form.bits}g{form.group_size}{'-sym' if form.symmetric else ''}",
        "nf4": f"nf4g{form.group_size}",
    }
    assert codec_of(form).form.label == labels[form.codec]


def test_a_report_shows_the_formats_that_the_manifest_notes(sample: Sample) -> None:
    manifest, report = read_manifest(sample.bundle), sample.built.report
    assert manifest.tensors is not None and report.quantization is not None
    noted = {key: tensor.format for tensor in manifest.tensors for key in tensor.matrices}
    for linear in report.quantization.linears:
        shown = Format.model_validate(
            {name: getattr(linear, name) for name in ("bits", "group_size", "symmetric", "codec")}
        )
        assert shown.label == noted[linear.name].label
