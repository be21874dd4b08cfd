"""The manifest says where every quantized matrix is and in which format, and a bundle without that is still read."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from builds import Sample, bundle_weights
from models import TINY, write_checkpoint

from glmexport.assembly.external import write_graphs
from glmexport.assembly.graph_files import load_graph
from glmexport.assembly.read import BundleWeights
from glmexport.assembly.unnoted import tensors_before_they_were_noted
from glmexport.assembly.write import graphs_of
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import MANIFEST, read_manifest
from glmexport.bundle.names import SCORING
from glmexport.bundle.records import QuantizedMatrix, StoredTensor
from glmexport.foundation.errors import BundleError
from glmexport.foundation.progress import Silent
from glmexport.foundation.target import shipped_targets
from glmexport.lowering.pipeline import lower
from glmexport.lowering.stored import stored_tensors
from glmexport.reference.reference import Reference
from glmexport.tuning.rounding import RoundedWeights
from glmexport.validation.weights import check_weights
from glmexport.workflows.job import recipe_for
from glmexport.workflows.original import Original

TARGETS = {target.name: target for target in shipped_targets()}


def without_tensors(bundle: Path, copy: Path) -> Path:
    """A bundle as it was written before its manifest noted the tensors."""
    shutil.copytree(bundle, copy)
    document = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    assert document.pop("tensors")
    (copy / MANIFEST).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return copy


def test_every_quantized_matrix_is_noted_in_its_format(sample: Sample) -> None:
    manifest = read_manifest(sample.bundle)
    assert manifest.tensors is not None
    noted = {key: tensor.format for tensor in manifest.tensors for key in tensor.matrices}
    assert set(noted) == {matrix.key for matrix in manifest.matrices}
    for matrix in manifest.matrices:
        form = noted[matrix.key]
        assert (form.bits, form.group_size, form.symmetric) == (matrix.bits, matrix.group_size, matrix.symmetric)
    graph = load_graph(sample.bundle, SCORING)
    assert {name for tensor in manifest.tensors for name in tensor.parts.values()} <= set(graph.initializers)


def test_a_bundle_of_before_opens_and_has_the_same_weights(sample: Sample, tmp_path: Path) -> None:
    old = without_tensors(sample.bundle, tmp_path / "old")
    manifest = read_manifest(old)
    assert manifest.tensors is None
    Bundle.open(old).verify()
    # What it did not have is not written either: its digest, and with it a signature, stays what it was.
    assert "tensors" not in json.loads(manifest.model_dump_json())
    assert manifest.digest() != read_manifest(sample.bundle).digest()
    ours, theirs = (bundle_weights(bundle, sample.checkpoint) for bundle in (sample.bundle, old))
    assert set(ours.quantized_keys) == set(theirs.quantized_keys) and ours.other_keys == theirs.other_keys
    for key in ours.quantized_keys:
        one, other = ours.quantized(key), theirs.quantized(key)
        assert one is not None and other is not None and one.digest() == other.digest()
    original = Original.open(str(sample.checkpoint), Silent())
    reference = Reference(original.checkpoint, original.architecture)
    found = check_weights(Bundle.open(old), reference, Silent())
    assert found.faults == () and found.undecided == 0


def lowered(directory: Path, family: str, target: str, *, tied: bool = False) -> tuple[RoundedWeights, ir.Model, Path]:
    write_checkpoint(directory / "checkpoint", family, **TINY[family], tie_word_embeddings=tied)
    original = Original.open(str(directory / "checkpoint"), Silent())
    chosen = TARGETS[target]
    architecture = original.architecture_for(chosen)
    recipe = recipe_for(original, None, chosen)
    weights = RoundedWeights(original.checkpoint, architecture, recipe, searched=False)
    tables = Reference(original.checkpoint, architecture).rotary_tables(architecture.context_length)
    model = lower(graphs_of(architecture, chosen.graph)[SCORING], chosen, weights, tables)
    write_graphs({SCORING: model}, directory, Silent(), None)
    return weights, model, directory


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("target", ["x86-avx2", "cuda", "qnn", "trt-rtx", "openvino"])
def test_what_is_noted_is_what_could_be_recovered(family: str, target: str, tmp_path: Path) -> None:
    """For every form of graph there is, tables and experts included."""
    weights, model, directory = lowered(tmp_path, family, target)
    shapes = weights.architecture.shapes()
    graph = load_graph(directory, SCORING)
    recovered = tensors_before_they_were_noted(graph, shapes, weights.architecture.hidden_size)

    def comparable(tensors: tuple[StoredTensor, ...]) -> list[str]:
        return sorted(tensor.model_dump_json() for tensor in tensors)

    assert comparable(stored_tensors(model)) == comparable(recovered)


def test_one_table_that_lies_in_the_graph_twice_is_read_twice(tmp_path: Path) -> None:
    weights, model, directory = lowered(tmp_path, "glm", "trt-rtx", tied=True)
    tensors, key = stored_tensors(model), weights.architecture.embedding
    assert [tensor.layout for tensor in tensors if key in tensor.matrices] == ["packed", "columns"]
    held = BundleWeights(load_graph(directory, SCORING), tensors, weights.architecture.shapes())
    decided = weights.quantized(key)
    assert [each.digest() for each in held.every(key)] == [decided.digest()] * 2
    product = held.dequantized(key)
    assert product is not None and torch.equal(product, decided.dequantize())


def test_a_note_that_the_graph_contradicts_is_an_error(sample: Sample) -> None:
    manifest = read_manifest(sample.bundle)
    assert manifest.tensors is not None
    graph = load_graph(sample.bundle, SCORING)
    original = Original.open(str(sample.checkpoint), Silent())
    first = manifest.tensors[0]
    other = first.format.model_copy(update={"bits": 2})
    for wrong, reason in (
        (first.model_copy(update={"format": other}), "reads it with bits"),
        (first.model_copy(update={"parts": {**first.parts, "scales": "nowhere"}}), "no such tensor"),
        (first.model_copy(update={"matrices": ("model.norm.weight",)}), "no such matrix"),
    ):
        with pytest.raises(BundleError, match=reason):
            BundleWeights(graph, [wrong], original.architecture.shapes())


def test_a_matrix_of_a_manifest_of_before_is_written_as_it_was_read() -> None:
    """To the byte: a manifest's digest, which is signed, is over this."""
    written = (
        '{"key":"model.layers.0.mlp.down_proj.weight","layer":0,"part":"down","bits":4,"group_size":32,'
        '"symmetric":false,"bits_per_weight":4.625,"digest":"sha256:00","relative_error":0.01,'
        '"round_to_nearest_error":0.02,"damping":0.01,"dead_columns":0,"double":false,'
        '"effective_tokens_per_column":3.5,"chosen":null,"shrinkage":0.5,"unpolished_rows":1,"folded":true,'
        '"nearest_rows":2,"fallback":null}'
    )
    assert QuantizedMatrix.model_validate_json(written).model_dump_json() == written


@pytest.mark.parametrize("parts", [("codes",), ("codes", "scales"), ("codes", "scales", "zeros")])
def test_a_note_without_what_its_format_stores_is_an_error(parts: tuple[str, ...]) -> None:
    form = {"bits": 4, "group_size": 32}
    with pytest.raises(ValueError, match="parts"):
        StoredTensor.model_validate({"matrices": ["a"], "format": form, "parts": dict.fromkeys(parts, "x")})


@pytest.mark.skipif(sys.platform != "linux", reason="only the kernel of Linux tells what is mapped")
def test_what_was_read_is_not_kept(sample: Sample) -> None:
    """A mixture has tens of thousands of matrices, and each would keep a mapping of its file and a descriptor."""

    def kept() -> tuple[int, int]:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
        return mapped.count(str(sample.bundle.resolve())), len(list(Path("/proc/self/fd").iterdir()))

    weights = bundle_weights(sample.bundle, sample.checkpoint)
    before = kept()
    for key in weights.quantized_keys:
        weights.every(key)
    for key in weights.other_keys:
        weights.tensor(key)
    assert weights.constant("cos_cache") is not None
    assert kept() == before
