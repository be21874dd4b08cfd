"""Slices of a model: which blocks, what the whole is told from them, and bundles that the runtime loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import MIXTURE, write_checkpoint

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import Source
from glmexport.bundle.names import GENAI_CONFIG
from glmexport.engine.generation import GenerationSession
from glmexport.foundation.evidence import CandidateSettings
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import open_recipe
from glmexport.foundation.target import open_target
from glmexport.reference.reference import Reference
from glmexport.tuning.slices import SliceBundles, slices_of, weights_of
from glmexport.workflows.original import Original

SETTINGS = CandidateSettings(recipe="w4g32", accuracy_level=4, packed_qkv=True, threads=1)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Original:
    directory = tmp_path_factory.mktemp("deep")
    write_checkpoint(directory, num_hidden_layers=6)
    return Original.open(str(directory), Silent())


def test_a_small_model_is_timed_whole(deep: Original) -> None:
    slices = slices_of(deep.architecture)
    assert slices.architectures == (deep.architecture,)
    assert slices.whole([3.0]) == 3.0 and slices.description == "all 6 blocks"


def test_few_blocks_and_more(deep: Original) -> None:
    slices = slices_of(deep.architecture, whole=0, added=0)
    assert [len(each.layers) for each in slices.architectures] == [1, 3]
    # One block takes 0.5 s, and everything else 2 s.
    assert slices.whole([2.5, 3.5]) == pytest.approx(2 + 6 * 0.5)
    # Noise does not make a block free, or worse.
    assert slices.whole([2.5, 2.4]) == 2.5
    assert slices.description == "1 and 3 of 6 blocks, extrapolated to all"
    enough = slices_of(deep.architecture, whole=0, added=3 * weights_of(deep.architecture.layers[:1]))
    assert [len(each.layers) for each in enough.architectures] == [1, 4]


def test_a_model_that_has_no_more_blocks_is_timed_whole(deep: Original) -> None:
    added = 6 * weights_of(deep.architecture.layers[:1])
    assert slices_of(deep.architecture, whole=0, added=added).architectures == (deep.architecture,)


def test_every_kind_of_block_is_in_a_slice(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "glm4_moe", **MIXTURE | {"first_k_dense_replace": 2, "num_hidden_layers": 7})
    architecture = Original.open(str(tmp_path), Silent()).architecture
    fewer, more = slices_of(architecture, whole=0, added=0).architectures
    assert [layer.prefix.rpartition(".")[2] for layer in fewer.layers] == ["0", "2"]
    assert [layer.prefix.rpartition(".")[2] for layer in more.layers] == ["0", "2", "3", "4"]
    # Loops count the caches from 0.
    assert [layer.index for layer in more.layers] == [0, 1, 2, 3]


def test_bundles_of_slices_generate(deep: Original, tmp_path: Path) -> None:
    slices = slices_of(deep.architecture, whole=0, added=0)
    bundles = SliceBundles(
        tmp_path / "slices",
        slices,
        deep.checkpoint,
        Reference(deep.checkpoint, deep.architecture).rotary_tables(deep.architecture.context_length),
        open_target("x86-avx2"),
        {"w4g32": open_recipe("w4g32")},
        Source(name="x", digest="x", model_type="glm4", parameters=1, bytes=1, unused={}),
    )
    places = bundles.of(SETTINGS)
    for place, layers in zip(places, (1, 3), strict=True):
        config = json.loads((place / GENAI_CONFIG).read_text(encoding="utf-8"))
        decoder = config["model"]["decoder"]
        assert decoder["num_hidden_layers"] == layers
        assert decoder["session_options"]["intra_op_num_threads"] == 1
        assert len(GenerationSession.open(Bundle.open(place), 1).tokens([1, 2, 3], 4)) == 4
    # Another session setting is another configuration of the same files.
    quiet = SETTINGS.model_copy(update={"session": {"session.intra_op.allow_spinning": "0"}})
    others = bundles.of(quiet)
    assert not set(others) & set(places) and bundles.of(SETTINGS) == places
    options = json.loads((others[0] / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]["decoder"]["session_options"]
    assert options["session.intra_op.allow_spinning"] == "0"
    assert (others[0] / "model.onnx").samefile(places[0] / "model.onnx")
    assert len(GenerationSession.open(Bundle.open(others[1]), 1).tokens([1, 2, 3], 4)) == 4
    # Another arithmetic is another graph over the same weights.
    exact = bundles.of(SETTINGS.model_copy(update={"accuracy_level": 0}))
    assert (exact[0] / "model.onnx").read_bytes() != (places[0] / "model.onnx").read_bytes()
    assert (exact[0] / "weights/head.data").samefile(places[0] / "weights/head.data")


def test_a_bundle_that_was_not_finished_is_written_again(deep: Original, tmp_path: Path) -> None:
    def bundles() -> SliceBundles:
        return SliceBundles(
            tmp_path,
            slices_of(deep.architecture),
            deep.checkpoint,
            Reference(deep.checkpoint, deep.architecture).rotary_tables(deep.architecture.context_length),
            open_target("x86-avx2"),
            {"w4g32": open_recipe("w4g32")},
            Source(name="x", digest="x", model_type="glm4", parameters=1, bytes=1, unused={}),
        )

    (place,) = bundles().of(SETTINGS)
    written = tmp_path / place.name.partition(".")[0]
    before = (written / "bundle.json").stat().st_mtime_ns
    assert bundles().of(SETTINGS) == [place] and (written / "bundle.json").stat().st_mtime_ns == before
    (written / "bundle.json").unlink()
    assert bundles().of(SETTINGS) == [place] and (written / "bundle.json").is_file()
