"""The original as it is computed here against transformers' whole model: what it finds, and where it is not made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import factors, write_adapter
from builds import QUICK, Sample, small_checkpoint

from glmexport.foundation.progress import Silent
from glmexport.reference.reference import Reference
from glmexport.report.document import read_report
from glmexport.results.record import Verdict
from glmexport.results.reference import ReferenceCheck
from glmexport.validation.gates import reference_gate
from glmexport.validation.texts import EvaluationText
from glmexport.validation.whole_model import check_reference
from glmexport.workflows.original import Original


def texts(*lengths: int) -> list[EvaluationText]:
    generator = torch.Generator().manual_seed(0)
    return [
        EvaluationText(str(length), "en", torch.randint(0, 250, (length,), generator=generator), 1)
        for length in lengths
    ]


def reference_of(checkpoint: Path, adapter: Path | None = None) -> Reference:
    original = Original.open(str(checkpoint), Silent(), str(adapter) if adapter else None)
    return Reference(original.checkpoint, original.architecture)


def test_the_shortest_text_that_is_long_enough_is_compared(sample: Sample, tmp_path: Path) -> None:
    reference = reference_of(sample.checkpoint)
    assert check_reference(reference, texts(200, 60, 10), tmp_path, None, Silent()).positions == 60
    assert check_reference(reference, texts(4, 10), tmp_path, None, Silent()).positions == 10
    assert not list(tmp_path.iterdir())


def test_another_table_than_transformers_reads_is_a_block(sample: Sample, tmp_path: Path) -> None:
    right = reference_of(sample.checkpoint)
    architecture = right.architecture
    wrong = Reference(
        right.checkpoint,
        replace(architecture, lm_head=replace(architecture.lm_head, key="model.embed_tokens"), tied=True),
    )
    (gate,) = reference_gate(check_reference(wrong, texts(60), tmp_path, None, Silent()))
    assert gate.verdict is Verdict.BLOCK and gate.value > 100 * gate.limit
    (gate,) = reference_gate(check_reference(right, texts(60), tmp_path, None, Silent()))
    assert gate.verdict is Verdict.PASS and gate.value < gate.limit / 20
    assert reference_gate(ReferenceCheck(positions=9, max_difference=float("nan"), limit=1))[0].verdict is Verdict.BLOCK


def test_where_the_check_is_not_made_the_reason_is_told(sample: Sample, tmp_path: Path) -> None:
    reference = reference_of(sample.checkpoint)
    small = check_reference(reference, texts(60), tmp_path, 1, Silent())
    assert small.max_difference is None and "GiB may be taken" in (small.absent_because or "")
    assert reference_gate(small) == () == reference_gate(None)
    adapter = write_adapter(tmp_path / "adapter", factors("model.layers.0.self_attn.q_proj", 128, 128))
    merged = check_reference(reference_of(sample.checkpoint, adapter), texts(60), tmp_path, None, Silent())
    assert merged.positions == 0 and "adapter" in (merged.absent_because or "")
    with pytest.raises(ValueError, match="absent_because"):
        ReferenceCheck(positions=3)


def test_a_checkpoint_that_transformers_does_not_load_is_told(sample: Sample, tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "checkpoint")
    reference = reference_of(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    reference.checkpoint = reference_of(sample.checkpoint).checkpoint
    reference.checkpoint.path = tmp_path / "checkpoint"
    told = check_reference(reference, texts(60), tmp_path, None, Silent())
    assert told.max_difference is None and "does not load" in (told.absent_because or "")


def test_a_validation_reports_the_check(sample: Sample) -> None:
    report = read_report(sample.bundle / "report.json")
    assert report.reference is not None and report.reference.max_difference is not None
    assert [gate.verdict for gate in report.gates if gate.name == "Original against transformers"] == [Verdict.PASS]
    assert "Original against transformers" in (sample.bundle / "report.md").read_text(encoding="utf-8")
    assert QUICK.max_memory_bytes is None
