"""A walk whose calibration text passes the blocks in bf16: the same every time, near that of fp32, and not the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from tiny import Model, digests

from glmexport.quantization.quantized_model import QuantizedModel
from glmexport.quantization.walk import Walk
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic

COARSE = OriginalArithmetic(route="fp32", coarse_ratio=2.0)
BOTH = OriginalArithmetic(route="fp32", coarse_ratio=2.0, moments_ratio=2.0)
MIXTURE = {
    "model_type": "glm4_moe",
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 2,
}


@pytest.mark.parametrize("changes", [{}, MIXTURE], ids=["dense", "mixture"])
def test_a_coarse_walk_solves_as_well(changes: dict[str, object], tmp_path: Path) -> None:
    model = Model(tmp_path / "model", **changes)

    def walked(name: str, arithmetic: OriginalArithmetic) -> QuantizedModel:
        return Walk.prepare(replace(model.job(tmp_path / name), arithmetic=arithmetic)).run()

    fine, coarse, again = walked("fine", UNCHECKED), walked("coarse", COARSE), walked("again", COARSE)
    assert digests(coarse) == digests(again)
    both = walked("both", BOTH)
    assert digests(coarse) != digests(fine)
    assert digests(both) not in (digests(fine), digests(coarse))
    assert not coarse.job.reference().coarse and coarse.job.calibrated_reference().coarse
    for rounded in (coarse, both):
        assert [record.key for record in rounded.records] == [record.key for record in fine.records]
        # What 8 bits leave is about as small as what bf16 adds to the inputs of this model's few columns, and so is
        # what 4 bits leave of a single matrix.
        ratios = [
            other.relative_error / one.relative_error
            for one, other in zip(fine.records, rounded.records, strict=True)
            if one.bits == 4 and one.relative_error and other.relative_error
        ]
        assert len(ratios) >= 8
        assert fmean(ratios) == pytest.approx(1.0, abs=0.15)
