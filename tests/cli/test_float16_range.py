"""A target that computes in float16: what calibration text brings about is held against where the type ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builds import THREADS, build, small_checkpoint, write_recipe
from models import MIXTURE
from safetensors.torch import load_file, save_file

import glmexport.workflows.build
from glmexport.bundle.manifest import LargestActivation, read_manifest
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import open_recipe
from glmexport.foundation.target import open_target
from glmexport.results.record import Verdict
from glmexport.validation.gates import range_gate
from glmexport.workflows.build import BuiltUnrun
from glmexport.workflows.job import Job
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions

DOWN = "model.layers.0.mlp.down_proj.weight"
NAME = "Largest activation in float16"


def louder(directory: Path, family: str, factor: float) -> Path:
    """The first block adds so many times as much to the stream, which the next norm takes off again."""
    small_checkpoint(directory, family, **(MIXTURE if family == "glm4_moe" else {}))
    tensors = load_file(directory / "model.safetensors")
    tensors[DOWN] *= factor
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def built(checkpoint: Path, place: Path, target: str) -> BuiltUnrun:
    original = Original.open(str(checkpoint), Silent())
    job = Job(open_target(target), open_recipe(str(write_recipe(place))), place / "bundle")
    (bundle,) = glmexport.workflows.build.build(original, [job], BuildOptions(THREADS), Silent())
    assert isinstance(bundle, BuiltUnrun)
    return bundle


@pytest.mark.parametrize(
    ("family", "factor", "verdict"),
    [
        ("glm", 1.0, Verdict.PASS),
        ("glm", 8e4, Verdict.WARN),
        ("glm", 1.6e5, Verdict.BLOCK),
        ("glm4_moe", 1.6e5, Verdict.BLOCK),
    ],
    ids=str,
)
def test_the_gate_is_of_the_quantized_model_on_its_calibration_text(
    family: str, factor: float, verdict: Verdict, tmp_path: Path
) -> None:
    bundle = built(louder(tmp_path / "checkpoint", family, factor), tmp_path, "cuda")
    (gate,) = [gate for gate in bundle.unrun.gates if gate.name == NAME]
    found = read_manifest(bundle.directory).largest_activation
    assert found is not None and gate.value == found.magnitude
    assert gate.verdict is verdict and bundle.unrun.verdict.severity >= verdict.severity
    if factor > 1:
        # Read first where the layer adds it up, or by the one behind it.
        assert found.at.startswith("model.layers.1.") or found.at == "model.norm"


@pytest.mark.parametrize(
    ("magnitude", "verdict"),
    [(0.0, "PASS"), (32752.0, "PASS"), (32753.0, "WARN"), (65504.0, "WARN"), (65505.0, "BLOCK"), (1e38, "BLOCK"),
     (float("inf"), "BLOCK"), (float("nan"), "BLOCK")],
)  # fmt: skip
def test_limits(magnitude: float, verdict: str) -> None:
    gate = range_gate(LargestActivation(magnitude=magnitude, at="model.norm"))
    assert gate.verdict is Verdict[verdict] and "model.norm" in gate.sample


def test_other_types_have_no_such_figure(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "checkpoint")
    (bundle,) = build(tmp_path / "checkpoint", tmp_path / "bundle", write_recipe(tmp_path))
    assert "largest_activation" not in json.loads((bundle.directory / "bundle.json").read_text(encoding="utf-8"))
    assert NAME not in {gate.name for gate in bundle.report.gates}
