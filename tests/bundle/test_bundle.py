"""A bundle as what functions are handed: what it says of itself, and that nothing is read twice or too early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builds import Sample
from forged import forge

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.genai_config import GenaiConfig
from glmexport.bundle.loop import FixedLoopConfig, LoopConfig, read_loop
from glmexport.bundle.manifest import MANIFEST, read_manifest
from glmexport.bundle.names import GENAI_CONFIG, SCORING
from glmexport.foundation.errors import BundleError, CheckpointError

OWN_LOOP = {
    "graph": "model.onnx",
    "provider": {"name": "CPUExecutionProvider", "package": "onnxruntime"},
    "context_length": 96,
    "eos_token_id": [7, 9],
    "input_ids": "input_ids",
    "logits": "logits",
    "caches": {},
}


@pytest.fixture
def directory(sample: Sample, tmp_path: Path) -> Path:
    """A copy of the small bundle."""
    return Path(shutil.copytree(sample.bundle, tmp_path / "bundle"))


def test_it_says_what_its_files_say(sample: Sample) -> None:
    bundle, manifest = Bundle.open(sample.bundle), read_manifest(sample.bundle)
    config = json.loads((sample.bundle / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]
    assert bundle.manifest == manifest
    assert (bundle.name, bundle.target) == (sample.bundle.name, manifest.target)
    assert bundle.digest == manifest.digest()
    assert bundle.ends == frozenset(config["eos_token_id"])
    assert bundle.context_length == config["context_length"]
    assert bundle.model.is_file() and bundle.scoring == sample.bundle / SCORING
    assert bundle.loadable == sample.bundle.resolve()
    assert bundle.tokenizer.decode(bundle.tokenizer.encode("zwei Wörter")) == "zwei Wörter"
    assert bundle.runs_here
    assert bundle.bytes == sample.built.report.size.bundle_bytes
    bundle.verify()


@pytest.mark.parametrize(
    ("added", "kind"),
    [
        ({"attention_mask": "attention_mask"}, LoopConfig),
        ({"chunk": 16, "step_graph": "step.onnx", "position_ids": "p", "asked_position": "a"}, FixedLoopConfig),
    ],
)
def test_a_loop_of_ours_says_the_same(directory: Path, added: dict[str, object], kind: type) -> None:
    assert isinstance(Bundle.open(directory).loop, GenaiConfig)
    (directory / "loop.json").write_text(json.dumps(OWN_LOOP | added), encoding="utf-8")
    bundle = Bundle.open(directory)
    assert isinstance(bundle.loop, kind)
    assert bundle.loop == read_loop(directory)
    assert (bundle.ends, bundle.context_length) == (frozenset({7, 9}), 96)


def test_nothing_but_the_manifest_is_read_before_it_is_asked_for(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_file() and path.name != MANIFEST:
            path.unlink()
    bundle = Bundle.open(directory)
    with pytest.raises(BundleError, match=GENAI_CONFIG):
        bundle.context_length  # noqa: B018
    with pytest.raises(CheckpointError, match="tokenizer"):
        bundle.tokenizer  # noqa: B018
    with pytest.raises(BundleError, match="is missing"):
        bundle.verify()


def test_what_was_read_is_not_read_again(directory: Path) -> None:
    bundle = Bundle.open(directory)
    loop, tokenizer, digest = bundle.loop, bundle.tokenizer, bundle.digest
    shutil.rmtree(directory)
    assert bundle.loop is loop and bundle.tokenizer is tokenizer and bundle.digest == digest


def test_a_target_whose_provider_is_not_here(directory: Path) -> None:
    forge(directory, MANIFEST, lambda content: content["target"]["provider"].update(name="QNNExecutionProvider"))
    assert not Bundle.open(directory).runs_here


def test_one_file_is_compared_with_the_manifest(directory: Path) -> None:
    bundle = Bundle.open(directory)
    bundle.require_file(SCORING)
    with pytest.raises(BundleError, match=r"x\.onnx is not in the bundle's manifest"):
        bundle.require_file("x.onnx")
    with bundle.path(GENAI_CONFIG).open("a") as file:
        file.write("\n")
    bundle.require_file(SCORING)
    with pytest.raises(BundleError, match=rf"{GENAI_CONFIG} is not the file that the manifest lists"):
        bundle.require_file(GENAI_CONFIG)
    with pytest.raises(BundleError, match=rf"{GENAI_CONFIG} is not the file that the manifest lists"):
        bundle.verify()


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path)
