"""Files that change while a command runs: it ends with their name, and nothing of two checkpoints is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import builds
import pytest
from builds import QUICK, THREADS, TURNS, Sample, no_turns, write_recipe, write_target

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import read_manifest
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Silent, Track
from glmexport.workflows.capture import CaptureOptions, capture_reference
from glmexport.workflows.convert import convert_to_gptq
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions, validate_bundle

RECIPE = "rtn-w4g32"


class Meanwhile(Silent):
    """Something happens when work of that ``label`` begins."""

    def __init__(self, label: str, happens: Callable[[], object]) -> None:
        super().__init__()
        self.label, self.happens = label, happens

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Track]:
        if label == self.label:
            self.happens()
        with super().track(label, total) as track:
            yield track


@pytest.fixture
def checkpoint(sample: Sample, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample.checkpoint, tmp_path / "checkpoint"))


def longer(path: Path) -> Callable[[], object]:
    return lambda: path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json"])
def test_a_build_leaves_no_bundle(name: str, checkpoint: Path, tmp_path: Path) -> None:
    watching = Meanwhile("Quantizing", longer(checkpoint / name))
    with pytest.raises(CheckpointError, match=rf"{name} has changed"):
        builds.build(checkpoint, tmp_path / "out" / "bundle", RECIPE, progress=watching)
    assert all(path.name.startswith(".glmexport-work-") for path in (tmp_path / "out").iterdir())


def test_a_build_has_the_recipe_and_the_target_that_were_opened(checkpoint: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    target = write_target(tmp_path, {}, "mine")

    def emptied() -> None:
        recipe.write_text("", encoding="utf-8")
        target.unlink()

    bundle = tmp_path / "bundle"
    builds.build(checkpoint, bundle, recipe, (str(target),), progress=Meanwhile("Quantizing", emptied))
    manifest = read_manifest(bundle)
    assert (manifest.recipe.name, manifest.target.name) == ("small", "mine")


def test_a_capture_leaves_no_reference(checkpoint: Path, tmp_path: Path) -> None:
    original = Original.open(str(checkpoint), Silent())
    watching = Meanwhile("Capturing", longer(checkpoint / "config.json"))
    with pytest.raises(CheckpointError, match=r"config\.json has changed"):
        capture_reference(original, tmp_path / "reference", CaptureOptions(THREADS, QUICK), watching)
    assert not (tmp_path / "reference").exists()


def test_a_conversion_leaves_no_checkpoint(sample: Sample, checkpoint: Path, tmp_path: Path) -> None:
    original = Original.open(str(checkpoint), Silent())
    watching = Meanwhile("Writing the checkpoint", longer(checkpoint / "tokenizer_config.json"))
    output = tmp_path / "gptq"
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json has changed"):
        bundle = Bundle.open(sample.bundle)
        convert_to_gptq(bundle, original, output, layout="gptqmodel", force=False, progress=watching)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_a_validation_keeps_the_report_that_was_there(
    sample: Sample, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TURNS, no_turns)
    bundle = Path(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    report = (bundle / "report.json").read_bytes()
    original = Original.open(str(checkpoint), Silent())
    watching = Meanwhile("Bundle in ONNX Runtime", longer(checkpoint / "chat_template.jinja"))
    options = BuildOptions(THREADS, validation=QUICK)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja has changed"):
        validate_bundle(Bundle.open(bundle), original, options, watching)
    assert (bundle / "report.json").read_bytes() == report
