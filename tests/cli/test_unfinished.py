"""A family that is known and cannot be built: inspect tells what it is and what is missing, build refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builds import Run
from models import write_checkpoint

MIXED = {
    "model_type": "glm5_next",
    "text_config": {
        "num_hidden_layers": 6,
        "layer_types": ["linear_attention"] * 4 + ["indexed_attention"] * 2,
        "mlp_layer_types": ["dense"] * 5 + ["sparse"],
        "n_routed_experts": 12,
        "linear_attn_config": {"short_conv_kernel_size": 3},
        "index_kpool": 8,
        "hc_mult": 2,
        "swiglu_limit": 7,
    },
    "vision_config": {"depth": 2},
}
PARTS = [
    "convolutions of 3 tokens",
    "in 4 of 6 layers",
    "pools of 8 tokens",
    "in 2 layers",
    "2 residual streams",
    "12 experts in 1 layers",
    "clamped at 7",
    "the vision tower",
]


def checkpoint(path: Path, config: dict[str, Any]) -> Path:
    write_checkpoint(path)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_inspect_tells_what_is_missing(tmp_path: Path, run: Run) -> None:
    path = checkpoint(tmp_path / "c", MIXED)
    told = run("inspect", path, "--json")
    assert told.code == 0 and told.document["family"] == "glm5_next"
    assert all(part in " ".join(told.document["missing"]) for part in PARTS)
    shown = run("inspect", path)
    assert shown.code == 0 and shown.stdout == ""
    assert all(part in " ".join(shown.stderr.split()) for part in PARTS)


def test_a_configuration_without_lists_has_the_defaults_of_transformers(tmp_path: Path, run: Run) -> None:
    path = checkpoint(tmp_path / "c", {"model_type": "glm5_next"})
    missing = " ".join(run("inspect", path, "--json").document["missing"])
    assert "in 34 of 45 layers" in missing and "288 experts in 42 layers" in missing and "vision" not in missing


@pytest.mark.parametrize("verb", ["build", "reference"])
def test_nothing_is_made_of_it(tmp_path: Path, verb: str, run: Run) -> None:
    path = checkpoint(tmp_path / "c", MIXED)
    refused = run(verb, path, "-o", tmp_path / "out", *(["--target", "x86-avx2"] if verb == "build" else []))
    assert refused.code == 64 and "hyper-connections" in " ".join(refused.stderr.split())
    assert not (tmp_path / "out").exists()
