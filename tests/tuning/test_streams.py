"""The model run block by block is the whole graph, and what its arithmetic does is told apart from its formats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILY, MIXTURE, write_checkpoint
from safetensors.torch import load_file, save_file

from glmexport.assembly.write import BundleContents, write_bundle
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import Source
from glmexport.bundle.names import LOGITS
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import open_recipe
from glmexport.foundation.target import Target, open_target
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.reference import Reference
from glmexport.tuning.arithmetic import Variants
from glmexport.tuning.rounding import RoundedWeights
from glmexport.tuning.slices import units
from glmexport.tuning.streams import Document, GraphPart, Streams, summarized
from glmexport.validation.fidelity import Streamed
from glmexport.validation.reference import reference_states
from glmexport.validation.texts import EvaluationText
from glmexport.workflows.original import Original

TEXTS = [
    EvaluationText("a", "en", torch.arange(3, 40), 2),
    EvaluationText("b", "zh", torch.arange(50, 70), 2),
    EvaluationText("c", "zh", torch.arange(90, 101), 2),
]
INDEXED: dict[str, Any] = {
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "num_hidden_layers": 4,
    "indexer_types": ["full", "shared", "full", "shared"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "glm4": {},
    "glm4_moe": MIXTURE,
    "glm4_moe_lite": {**FAMILY["glm4_moe_lite"]},
    "glm_moe_dsa": INDEXED,
}


def at_level(level: int) -> Target:
    target = open_target("x86-avx2")
    return target.model_copy(update={"weights": target.weights.model_copy(update={"accuracy_level": level})})


def source(original: Original) -> Source:
    return Source(name="x", digest="x", model_type=original.checkpoint.model_type, parameters=1, bytes=1, unused={})


def streams(original: Original, work: WorkDirectory, levels: tuple[int, ...] = (0, 4)) -> Streams:
    weights = RoundedWeights(original.checkpoint, original.architecture, open_recipe("w4g32"), searched=False)
    return Streams(
        "numerics-0",
        weights,
        Reference(original.checkpoint, original.architecture),
        Variants({f"level-{level}": at_level(level) for level in levels}, "level-0"),
        TEXTS,
        work,
        1,
    )


def answers(original: Original, work: WorkDirectory) -> Streamed:
    reference = Reference(original.checkpoint, original.architecture)
    return Streamed(reference_states(reference, TEXTS, work.path, Silent(), kept=work), reference)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_are_the_whole_graph(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", family, **FAMILIES[family])
    original = Original.open(str(tmp_path / "checkpoint"), Silent())
    weights = RoundedWeights(original.checkpoint, original.architecture, open_recipe("w4g32"), searched=False)
    tables = Reference(original.checkpoint, original.architecture).rotary_tables(original.architecture.context_length)
    contents = BundleContents(
        original.architecture, weights, tables, open_recipe("w4g32"), at_level(0), source(original)
    )
    manifest = write_bundle(tmp_path / "bundle", contents, Silent())
    session = ScoringSession(Bundle(tmp_path / "bundle", manifest), 1)
    parts = streams(original, WorkDirectory(tmp_path / "work", {}), (0,))
    parts._run(Silent())
    folder = tmp_path / "head"
    folder.mkdir()
    parts._write((), folder)
    head = GraphPart(folder / "level-0.onnx", at_level(0), 1)
    for text, span in zip(TEXTS, parts._spans, strict=True):
        logits = head.run(LOGITS, text.ids, parts._rows(parts._steps[-1], "level-0", span))[0]
        assert (logits - torch.from_numpy(session.logits(text.ids.numpy()))).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_cache_block_by_block_is_the_bundles(kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", "glm4", num_hidden_layers=2)
    original = Original.open(str(tmp_path / "checkpoint"), Silent())
    weights = RoundedWeights(original.checkpoint, original.architecture, open_recipe("w4g32"), searched=False)
    exact = at_level(0)
    target = exact.model_copy(update={"graph": exact.graph.model_copy(update={"kv_cache": kind})})
    reference = Reference(original.checkpoint, original.architecture)
    text = [list(range(20, 60)), list(range(100, 130))]
    tables = reference.rotary_tables(original.architecture.context_length)
    recipe, made_of = open_recipe("w4g32"), source(original)
    contents = BundleContents(original.architecture, weights, tables, recipe, target, made_of, cache_text=text)
    manifest = write_bundle(tmp_path / "bundle", contents, Silent())
    session = ScoringSession(Bundle(tmp_path / "bundle", manifest), 1)
    variants = {"exact": exact, "codes": target}
    work = WorkDirectory(tmp_path / "work", {})
    parts = Streams("n", weights, reference, Variants(variants, "exact", {"codes": "exact"}), TEXTS, work, 1, text)
    parts._run(Silent())
    folder = tmp_path / "head"
    folder.mkdir()
    parts._write((), folder)
    found = {key: GraphPart(folder / f"{key}.onnx", variants[key], 1) for key in variants}
    for index, (ids, span) in enumerate(zip((text.ids for text in TEXTS), parts._spans, strict=False)):
        logits = {
            key: part.run(LOGITS, ids, parts._rows(parts._steps[-1], key, span))[0] for key, part in found.items()
        }
        # The scales are the bundle's, so the numbers are, but for a code that rounds the other way.
        apart = (logits["codes"] - torch.from_numpy(session.logits(ids.numpy()))).abs().mean()
        moved = (logits["codes"] - logits["exact"]).abs().mean()
        assert apart < 0.1 * moved and moved > 0, index
    measured = parts.divergences(answers(original, work), Silent())
    assert [row.language for row in measured["codes"]] == [text.language for text in TEXTS]
    assert sum(row.arithmetic for row in measured["codes"]) > 0


def test_blocks_that_share_a_selection_stay_together(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "glm_moe_dsa", **INDEXED)
    architecture = Original.open(str(tmp_path), Silent()).architecture
    assert [[layer.index for layer in unit] for unit in units(architecture)] == [[0, 1], [2, 3]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Original:
    directory = tmp_path_factory.mktemp("small")
    write_checkpoint(directory, num_hidden_layers=2)
    return Original.open(str(directory), Silent())


def test_arithmetic_apart_from_formats(small: Original, tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "work", {})
    found = streams(small, work).divergences(answers(small, work), Silent())
    exact, rounded = found["level-0"], found["level-4"]
    assert [document.language for document in exact] == ["en", "zh", "zh"]
    assert [document.positions for document in exact] == [text.positions for text in TEXTS]
    for document in exact:
        assert document.arithmetic == 0 and document.original > 0
    for document in rounded:
        # int8 activations of a well-behaved model move far less than four bits do.
        assert 0 < document.arithmetic < document.original / 10
    # Everything but the result and the original's states is gone.
    left = {path.name for path in work.path.iterdir() if path.suffix == ".activations"}
    assert left == {"states-001.states.activations"}


def test_massive_activations_are_bad_for_int8(tmp_path: Path) -> None:
    """One channel a thousand times the others leaves the others of its block no levels at all."""
    write_massive(tmp_path / "checkpoint")
    original = Original.open(str(tmp_path / "checkpoint"), Silent())
    work = WorkDirectory(tmp_path / "work", {})
    found = streams(original, work).divergences(answers(original, work), Silent())
    moved = summarized(found["level-4"], 0.95).arithmetic
    assert moved.mean > 0.05 and summarized(found["level-0"], 0.95).arithmetic.mean == 0


def write_massive(directory: Path, factor: float = 3000.0) -> None:
    """A checkpoint whose norms give some channels huge values, which matrices with tiny columns there take back."""
    write_checkpoint(directory, num_hidden_layers=2)
    tensors = load_file(directory / "model.safetensors")
    channels = torch.arange(5, 128, 32)
    for key, value in tensors.items():
        if key.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            value[channels] *= factor
        elif key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_up_proj.weight")):
            value[:, channels] /= factor
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


class Killed(Exception):
    pass


def test_goes_on_after_the_last_block(small: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = WorkDirectory(tmp_path / "whole", {})
    wanted = streams(small, whole).divergences(answers(small, whole), Silent())
    work = WorkDirectory(tmp_path / "work", {})
    asked = answers(small, work)
    interrupted, written = streams(small, work), []
    write = interrupted._write

    def once(layers: Any, folder: Path) -> None:
        written.append(layers)
        if len(written) == 2:
            raise Killed
        write(layers, folder)

    monkeypatch.setattr(interrupted, "_write", once)
    with pytest.raises(Killed):
        interrupted.divergences(asked, Silent())
    again, more = streams(small, work), []
    rewrite = again._write
    monkeypatch.setattr(again, "_write", lambda layers, folder: (more.append(layers), rewrite(layers, folder)))
    assert again.divergences(asked, Silent()) == wanted
    # The second block and the head; the first block is not computed again.
    assert [len(layers) for layers in more] == [1, 0]
    # And finished, nothing is.
    finished = streams(small, work)
    monkeypatch.setattr(finished, "_write", lambda *_: pytest.fail("computed again"))
    assert finished.divergences(asked, Silent()) == wanted


def test_means_over_languages() -> None:
    documents = [
        Document("en", 10, original=1.0, arithmetic=0.1),
        Document("en", 30, original=1.0, arithmetic=0.1),
        Document("zh", 10, original=2.0, arithmetic=0.0),
    ]
    found = summarized(documents, 0.95)
    assert found.positions == 50
    assert found.original.mean == pytest.approx(4 / 50)
    assert (found.original.worst, found.original.language) == (pytest.approx(0.2), "zh")
    assert (found.arithmetic.worst, found.arithmetic.language) == (pytest.approx(0.005), "en")
    assert found.original.upper is not None and found.original.upper > found.original.mean
    assert summarized(documents[:1], 0.95).original.upper is None


def test_what_is_no_number_is_the_worst() -> None:
    found = summarized([Document("en", 1, 1.0, 1.0), Document("zh", 1, math.nan, math.nan)], 0.95)
    assert found.original.language == "zh" and math.isnan(found.original.worst)
