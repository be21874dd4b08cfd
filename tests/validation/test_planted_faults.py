"""Whatever the export might get wrong is found in the graph, and named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builds import RECIPE, Run, Sample, build, small_checkpoint, write_recipe

from benchmarks.faults import FAULTS, Stored, plant
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import MANIFEST, read_manifest
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.errors import EXIT_BLOCK
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Format
from glmexport.reference.reference import Reference
from glmexport.report.document import read_report
from glmexport.results.record import Verdict
from glmexport.results.weights import WeightCheck
from glmexport.validation.gates import weight_gates
from glmexport.validation.weights import check_weights, row_distances
from glmexport.workflows.original import Original

#: What has to be named, by the fault.
NAMED = {
    "scales of one layer ×1.01": "model.layers.1.self_attn.q_proj.weight",
    "chat template swapped": "Prompts with other tokens",
    "embeddings of one language damaged": "model.embed_tokens.weight",
    "RoPE base 15,000 for 10,000": "cos_cache",
    "one row of the lm_head zero": "lm_head.weight",
    "zero points of one matrix off by one": "model.layers.1.self_attn.o_proj.weight",
}


def checked(bundle: Path, checkpoint: Path) -> WeightCheck:
    original = Original.open(str(checkpoint), Silent())
    reference = Reference(original.checkpoint, original.architecture)
    return check_weights(Bundle.open(bundle), reference, Silent())


def test_nothing_is_wrong_with_a_bundle_as_it_is(sample: Sample) -> None:
    found = checked(sample.bundle, sample.checkpoint)
    assert found.faults == () and found.undecided == 0
    # Two layers of q, k, v, o, gate_up and down; lm_head; embedding. Norms and biases.
    assert found.matrices == 14 and found.tensors == 2 * (4 + 3) + 1
    assert [gate.verdict for gate in weight_gates(found)] == [Verdict.PASS] * 2


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_and_named(name: str, sample: Sample, tmp_path: Path, run: Run) -> None:
    bundle = plant(sample.bundle, tmp_path / "bundle", FAULTS[name])
    outcome = run("validate", bundle, "--against", sample.checkpoint, "--threads", "1")
    assert outcome.code == EXIT_BLOCK
    report = read_report(bundle / "report.json")
    blocked = [gate for gate in report.gates if gate.verdict is Verdict.BLOCK]
    assert any(NAMED[name] in f"{gate.name} {gate.sample}" for gate in blocked), blocked
    assert NAMED[name] in outcome.stderr
    for rendering in ("report.html", "report.md", "report.xml"):
        assert NAMED[name].replace("_", "\\_") in (bundle / rendering).read_text(encoding="utf-8") or NAMED[name] in (
            bundle / rendering
        ).read_text(encoding="utf-8").replace("\\", "")


def row_of_zeros(bundle: Path) -> None:
    Stored(bundle).edit("lm_head.weight.scales")[5] = 0


def shifted(bundle: Path) -> None:
    zero_points = Stored(bundle).edit("lm_head.weight.zero_points")
    zero_points[:] = zero_points + 1


@pytest.mark.parametrize(
    ("fault", "told"), [(row_of_zeros, r"\b1 of 264 rows"), (shifted, r"offset -(0\.9[5-9]|1\.0[0-5]) steps")]
)
def test_without_a_record_lost_rows_are_still_seen(
    fault: Callable[[Path], None], told: str, sample: Sample, tmp_path: Path
) -> None:
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    fault(bundle)
    manifest = read_manifest(bundle)
    matrices = tuple(matrix.model_copy(update={"digest": None}) for matrix in manifest.matrices)
    (bundle / MANIFEST).write_text(manifest.model_copy(update={"matrices": matrices}).model_dump_json())
    found = checked(bundle, sample.checkpoint)
    assert found.undecided == found.matrices
    (one,) = found.faults
    assert one.tensor == "lm_head.weight" and one.kind == "far" and re.search(told, one.detail)
    assert [gate.verdict for gate in weight_gates(found)] == [Verdict.PASS, Verdict.WARN]


@pytest.mark.parametrize("tied", [False, True])
def test_a_symmetric_embedding_is_what_was_decided(tied: bool, tmp_path: Path) -> None:
    """The operator that looks rows up has zero points always, of a format without them as well."""
    small_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=tied)
    recipe = write_recipe(tmp_path, RECIPE.replace("[embedding]\n", "[embedding]\nsymmetric = true\n"))
    (built,) = build(tmp_path / "checkpoint", tmp_path / "bundle", recipe)
    found = checked(built.directory, tmp_path / "checkpoint")
    assert found.faults == () and found.undecided == 0


def test_a_changed_norm_is_seen(sample: Sample, tmp_path: Path) -> None:
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    Stored(bundle).edit("model.layers.1.input_layernorm.weight")[7] += 1e-3
    (one,) = checked(bundle, sample.checkpoint).faults
    assert one.tensor == "model.layers.1.input_layernorm.weight" and one.kind == "other"


def test_distances_by_hand() -> None:
    form = Format(bits=4, group_size=16, symmetric=False)
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 1)
    scales = torch.tensor([[0.5], [0.5], [0.0]], dtype=torch.float16)
    linear = QuantizedLinear(form, codes, scales, torch.full((3, 1), 8, dtype=torch.uint8))
    exact = (torch.arange(16) - 8) * 0.5
    found = row_distances(linear, iter([torch.stack([exact, exact + 0.25]), torch.zeros(1, 16)]))
    assert found.distance[0] == 0 and found.distance[2] == 0
    assert float(found.distance[1]) == pytest.approx(1 / float((exact + 0.25).norm()))
    assert found.offset.tolist() == pytest.approx([0, -0.5, 0])
    assert found.lost.tolist() == [] and not found.shifted


def test_an_untrained_row_is_not_lost() -> None:
    form = Format(bits=4, group_size=16, symmetric=False)
    linear = QuantizedLinear(
        form,
        torch.zeros(2, 16, dtype=torch.uint8),
        torch.tensor([[1.0], [0.0]], dtype=torch.float16),
        torch.tensor([[1], [0]], dtype=torch.uint8),
    )
    rows = torch.stack([-torch.ones(16), torch.full((16,), 1e-12)])
    assert row_distances(linear, iter([rows])).lost.tolist() == []
    # One that was trained and is gone, is.
    rows[1] = 0.5
    assert row_distances(linear, iter([rows])).lost.tolist() == [1]


def test_the_digest_is_of_the_numbers() -> None:
    form = Format(bits=4, group_size=16, symmetric=True)
    codes, scales = torch.ones(2, 16, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.float16)
    linear = QuantizedLinear(form, codes, scales, None)
    assert linear.digest() == QuantizedLinear(form, codes.clone(), scales.float(), None).digest()
    changed = codes.clone()
    changed[1, 3] = 2
    assert linear.digest() != QuantizedLinear(form, changed, scales, None).digest()
    assert linear.digest() != QuantizedLinear(form, codes.reshape(1, 32), scales.reshape(1, 2), None).digest()
