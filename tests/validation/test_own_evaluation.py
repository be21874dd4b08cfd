"""Text of the user's to judge on: by language, and never what was calibrated on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builds import THREADS, Run, Sample

from glmexport.bundle.manifest import MANIFEST, read_manifest
from glmexport.calibration.corpus import USER, Document, evaluation_documents, fingerprint, shipped_documents
from glmexport.foundation.errors import EXIT_INPUT, InputError
from glmexport.report.document import read_report
from glmexport.tokenizer.tokenizer import Tokenizer

LINES = [
    {"text": "The court finds for the claimant. " * 3, "language": "en"},
    {"text": "The appeal is dismissed with costs. " * 3},
    {"text": "Kulingana na sheria ya mwaka 1990. " * 3, "language": "sw"},
]


def write(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_line_may_name_its_language(tmp_path: Path, sample: Sample) -> None:
    tokenizer = Tokenizer.open(sample.checkpoint)
    found = evaluation_documents([write(tmp_path / "own.jsonl", *LINES)], tokenizer)[-3:]
    assert [(each.id, each.language) for each in found] == [
        ("own.jsonl:1", "en"), ("own.jsonl:2", USER), ("own.jsonl:3", "sw"),
    ]  # fmt: skip


@pytest.mark.parametrize("language", ["../x", "", 7, "e", "en/zh", "en\n"])
def test_what_is_no_language(language: object, tmp_path: Path, sample: Sample) -> None:
    path = write(tmp_path / "own.jsonl", {"text": "Well.", "language": language})
    with pytest.raises(InputError, match=r"own\.jsonl, line 1: .* is no language"):
        evaluation_documents([path], Tokenizer.open(sample.checkpoint))


def test_it_is_judged_with_the_shipped_text(tmp_path: Path, sample: Sample, run: Run) -> None:
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    before = read_report(bundle / "report.json").fidelity
    own = write(tmp_path / "own.jsonl", *LINES)
    arguments = ("validate", bundle, "--against", sample.checkpoint, "--threads", THREADS, "--evaluation", own)
    run(*arguments, "--positions", "2000")
    found = read_report(bundle / "report.json").fidelity
    counts = {row.language: row.documents for row in found.languages}
    shipped = [document.language for document in shipped_documents("evaluation")]
    assert counts[USER] == 1
    assert counts["sw"] == shipped.count("sw") + 1
    assert found.text_digest != before.text_digest and found.text_digest.startswith("sha256:")


@pytest.mark.parametrize("known", [True, False])
def test_calibration_text_is_refused(known: bool, tmp_path: Path, sample: Sample, run: Run) -> None:
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    text = "A case that the bundle was fitted to, at length and in detail."
    if known:
        text = shipped_documents("calibration")[0].text
    else:
        manifest = read_manifest(bundle)
        assert manifest.calibration is not None
        own = (fingerprint(Document("x", USER, text)),)
        source = manifest.calibration.model_copy(update={"own": own})
        changed = manifest.model_copy(update={"calibration": source})
        (bundle / MANIFEST).write_text(changed.model_dump_json(), encoding="utf-8")
    own_text = write(tmp_path / "own.jsonl", {"text": f"  {text.upper()}\n"})
    before = (bundle / "report.json").read_bytes()
    outcome = run("validate", bundle, "--against", sample.checkpoint, "--evaluation", own_text)
    assert outcome.code == EXIT_INPUT and "calibration text too" in outcome.stderr and "own.jsonl:1" in outcome.stderr
    assert (bundle / "report.json").read_bytes() == before


def test_a_build_records_what_it_was_fitted_to(tmp_path: Path, sample: Sample, run: Run) -> None:
    text = write(tmp_path / "own.jsonl", LINES[0])
    outcome = run(
        "build", sample.checkpoint, "-o", tmp_path / "b", "--calibration", text, "--evaluation", text, "--threads", "1"
    )
    assert outcome.code == EXIT_INPUT and "calibration text too" in outcome.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("option", ["--evaluation", "--tasks"])
def test_a_capture_cannot_be_asked_more(option: str, tmp_path: Path, sample: Sample, run: Run) -> None:
    own = write(tmp_path / "own.jsonl", *LINES)
    outcome = run("validate", sample.bundle, "--reference", tmp_path, option, own)
    assert outcome.code == EXIT_INPUT and "--against" in outcome.stderr
