"""Heads and rotary widths that ONNX Runtime's operators take in one way or another, or that are refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from forms import EXACT, Session, changed, export, weights_of
from models import TINY, write_checkpoint

from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import open_recipe
from glmexport.foundation.target import Target, open_target
from glmexport.graph.heads import unfit_heads
from glmexport.workflows.checks import refuse_formats
from glmexport.workflows.job import Job
from glmexport.workflows.original import Original

TOLERANCE = 1e-4
HEADS = changed(weights={"accuracy_level": 0}, graph={"latent_cache": False})


def grouped(head_dim: int, factor: float) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}
    return {"head_dim": head_dim, "rope_parameters": rope}


def latent(rope: int) -> dict[str, Any]:
    return {"head_dim": rope, "qk_rope_head_dim": rope, "qk_nope_head_dim": 20, "v_head_dim": 18, "kv_lora_rank": 20}


#: Family, its sizes, target, and whether GroupQueryAttention rotates.
CASES: dict[str, tuple[str, dict[str, Any], Target, bool]] = {
    "half a head of 32": ("glm4", grouped(32, 0.5), EXACT, True),
    "half a head of 16": ("glm4", grouped(16, 0.5), EXACT, False),
    "24 of 32, which 8 divides and 16 does not": ("glm", grouped(32, 0.75), EXACT, False),
    "12 of 48": ("glm4", grouped(48, 0.25), EXACT, False),
    "a whole head of 40": ("glm", grouped(40, 1.0), EXACT, False),
    "halves, 24 of 64": ("glm4_moe", grouped(64, 0.375), EXACT, False),
    "halves, a head of 24": ("glm4_moe", grouped(24, 0.5), EXACT, False),
    "latents, 24": ("glm4_moe_lite", latent(24), EXACT, False),
    "latents, 10": ("glm4_moe_lite", latent(10), EXACT, False),
    "latents as heads, 16": ("glm4_moe_lite", latent(16), HEADS, True),
    "latents as heads, 24": ("glm4_moe_lite", latent(24), HEADS, False),
    "latents as heads, 10": ("glm4_moe_lite", latent(10), HEADS, False),
    "latents that are selected, 24": (
        "glm_moe_dsa",
        {**latent(24), "index_n_heads": 32, "index_head_dim": 30, "index_topk": 64},
        EXACT,
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_any_even_width_is_rotated_as_by_transformers(case: str, tmp_path: Path) -> None:
    family, sizes, target, inside = CASES[case]
    model = write_checkpoint(tmp_path / "checkpoint", family, **TINY[family] | sizes)
    weights = weights_of(tmp_path / "checkpoint", tmp_path / "work", None)
    assert unfit_heads(weights.architecture, target) is None
    out = export(weights, target, tmp_path / "out")
    ids = np.random.default_rng(1).integers(0, 250, (1, 24))
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(Session(out / "scoring.onnx")(ids)[0] - expected).max() <= TOLERANCE
    session = Session(out / "model.onnx")
    logits, *past = session(ids[:, :20])
    for position in range(20, 24):
        logits, *past = session(ids[:, position : position + 1], past, position + 1)
        assert np.abs(logits[:, -1] - expected[:, position]).max() <= TOLERANCE
    nodes = onnx.load(out / "model.onnx", load_external_data=False).graph.node
    rotary = {
        attribute.i
        for node in nodes
        if node.op_type == "GroupQueryAttention"
        for attribute in node.attribute
        if attribute.name == "do_rotary"
    }
    assert rotary <= {int(inside)} and (not inside) == any(node.op_type == "RotaryEmbedding" for node in nodes)


@pytest.mark.parametrize("family", ["glm", "glm4", "glm4_moe"])
def test_heads_that_no_operator_takes_are_refused_when_the_build_is_planned(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, **TINY[family] | grouped(12, 0.5))
    original = Original.open(str(tmp_path), Silent())
    job = Job(open_target("x86-avx2"), open_recipe("w4g32"), tmp_path / "bundle")
    with pytest.raises(InputError, match="heads of 12 numbers, and GroupQueryAttention takes multiples of 8"):
        refuse_formats(original, job)


def test_a_target_without_rotation_outside_is_refused_where_that_is_needed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "fits", "glm", **TINY["glm"])
    write_checkpoint(tmp_path / "does not", "glm", **TINY["glm"] | grouped(32, 0.75))
    contrib = [operator for operator in EXACT.graph.contrib_operators if "RotaryEmbedding" not in operator]
    target = changed(graph={"contrib_operators": contrib})
    fits, other = (Original.open(str(tmp_path / name), Silent()).architecture for name in ("fits", "does not"))
    assert unfit_heads(fits, target) is None
    assert "rotates 24 of 32 numbers by com.microsoft::RotaryEmbedding" in (unfit_heads(other, target) or "")
    latents = write_checkpoint(tmp_path / "latents", "glm4_moe_lite", **TINY["glm4_moe_lite"])
    assert latents is not None
    cached = Original.open(str(tmp_path / "latents"), Silent()).architecture
    assert "rotates latents" in (unfit_heads(cached, target) or "")


@pytest.mark.parametrize("head_dim", [12, 20, 24])
def test_graphs_of_fixed_shapes_take_heads_of_any_size(head_dim: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "glm", **TINY["glm"] | grouped(head_dim, 0.5))
    assert unfit_heads(Original.open(str(tmp_path), Silent()).architecture, open_target("qnn")) is None
