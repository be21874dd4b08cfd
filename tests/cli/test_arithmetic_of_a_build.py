"""A build computes by the route that it is given, says so, and never goes on with the work of another route."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builds import QUICK, TARGET, THREADS, Run, Sample, build, digests
from models import TINY, write_checkpoint

from glmexport.bundle.manifest import Manifest, read_manifest
from glmexport.formats.plan import allows_coarse
from glmexport.foundation.errors import EXIT_INPUT
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Budget, open_recipe
from glmexport.report.arithmetic import brief_arithmetic, told_arithmetic
from glmexport.report.document import read_report
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic
from glmexport.validation.capture import CapturedReference
from glmexport.workflows.build import quantize
from glmexport.workflows.capture import CaptureOptions, capture_reference
from glmexport.workflows.device import arithmetic_for
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions

ONEDNN = OriginalArithmetic(route="onednn", relative_error=7.5e-7, speed_ratio=2.125)
COARSE = OriginalArithmetic(route="fp32", coarse_ratio=2.5)


def test_each_route_has_work_of_its_own(sample: Sample, tmp_path: Path) -> None:
    recipe = open_recipe("rtn-w4g32")
    original = Original.open(str(sample.checkpoint), Silent())
    for arithmetic in (UNCHECKED, ONEDNN, UNCHECKED, COARSE):
        quantize(original, recipe, BuildOptions(THREADS, arithmetic=arithmetic), tmp_path, Silent())
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob(".glmexport-work-*/job.json")]
    # Nothing is calibrated that could be in bf16.
    assert sorted(job.pop("arithmetic") for job in jobs) == ["fp32", "onednn"]
    assert jobs[0] == jobs[1]


@pytest.mark.parametrize(
    ("family", "recipe", "expected"),
    [
        ("glm4", "w4g32", "fp32+bf16+moments"),
        ("glm4", "w8g128", "fp32"),
        ("glm4", "rtn-w4g32", "fp32"),
        # What every token passes has 8 bits in a mixture.
        ("glm4_moe", "w4g32", "fp32"),
        ("glm4_moe", "small", "fp32"),
    ],
)
def test_only_matrices_of_few_bits_are_calibrated_in_bf16(
    family: str, recipe: str, expected: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, family, **TINY[family])
    architecture = Original.open(str(tmp_path), Silent()).architecture
    asked = OriginalArithmetic(route="fp32", coarse_ratio=2.0, moments_ratio=2.0)
    assert arithmetic_for(architecture, open_recipe(recipe), asked).label == expected


def test_a_budget_may_give_more_bits(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "glm4", **TINY["glm4"])
    architecture = Original.open(str(tmp_path), Silent()).architecture
    recipe = open_recipe("w4g32")
    mixed = recipe.model_copy(update={"budget": Budget(bits_per_weight=4.5)})
    assert allows_coarse(architecture, recipe) and not allows_coarse(architecture, mixed)


@pytest.mark.slow
def test_a_bundle_names_its_route(sample: Sample, tmp_path: Path) -> None:
    (built,) = build(sample.checkpoint, tmp_path / "bundle", sample.recipe, arithmetic=ONEDNN)
    manifest = read_manifest(built.directory)
    assert manifest.arithmetic == "onednn"
    assert manifest == built.manifest
    # How fast it was is nothing that the bundle depends on.
    assert "2.125" not in manifest.model_dump_json()
    report = read_report(built.directory / "report.json")
    assert report.arithmetic == ONEDNN
    for name in ("report.html", "report.md"):
        assert "oneDNN" in (built.directory / name).read_text(encoding="utf-8")
    (again,) = build(sample.checkpoint, tmp_path / "again", sample.recipe, arithmetic=ONEDNN)
    assert digests(again.directory) == digests(built.directory)


def test_a_manifest_of_before_reads_as_it_was(sample: Sample) -> None:
    values = json.loads((sample.bundle / "bundle.json").read_text(encoding="utf-8"))
    assert values.pop("arithmetic").split("+")[0] in ("fp32", "onednn")
    older = Manifest.model_validate(values)
    assert older.arithmetic is None
    assert json.loads(older.model_dump_json()) == values


@pytest.mark.slow
def test_a_capture_names_its_route(sample: Sample, tmp_path: Path) -> None:
    original = Original.open(str(sample.checkpoint), Silent())
    captures = []
    for name, arithmetic in (("one", ONEDNN), ("other", OriginalArithmetic(route="onednn", speed_ratio=3.0))):
        options = CaptureOptions(THREADS, QUICK, top_k=16, arithmetic=arithmetic)
        capture_reference(original, tmp_path / name, options, Silent())
        captures.append(CapturedReference.open(tmp_path / name).capture)
        assert captures[-1].arithmetic == arithmetic
    assert captures[0].digest() == captures[1].digest()


def test_the_command_line_says_which(sample: Sample, tmp_path: Path, run: Run) -> None:
    outcome = run(
        "build", sample.checkpoint, "--target", TARGET, "--recipe", "rtn-w4g32", "--threads", THREADS,
        "--arithmetic", "fp32", "-o", tmp_path / "bundle",
    )  # fmt: skip
    assert brief_arithmetic(UNCHECKED) in outcome.stderr
    assert read_manifest(tmp_path / "bundle").arithmetic == "fp32"
    assert read_report(tmp_path / "bundle/report.json").arithmetic == UNCHECKED
    assert run("inspect", sample.checkpoint, "--arithmetic", "bf16").code == EXIT_INPUT


def test_in_words() -> None:
    assert brief_arithmetic(UNCHECKED) == "fp32 products by torch's default"
    assert brief_arithmetic(ONEDNN) == (
        "fp32 products by oneDNN, at least 2.12x as fast as torch's default, relative error 7.5e-07"
    )
    assert told_arithmetic(ONEDNN).startswith("fp32 products by oneDNN, at least 2.12×")
    assert told_arithmetic(None) == "not noted"
    assert brief_arithmetic(COARSE).endswith("calibration in bf16, at least 2.50x as fast as that")
    assert told_arithmetic(COARSE).endswith("calibration in bf16, at least 2.50× as fast as that")
