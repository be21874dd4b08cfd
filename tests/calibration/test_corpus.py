"""The shipped text is what corpora.toml says, and no evaluation text is calibrated on."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from glmexport.calibration import corpus as module
from glmexport.calibration.corpus import Document, overlap, shipped_documents, shipped_languages
from glmexport.foundation.definition import names
from glmexport.foundation.errors import DefinitionError
from glmexport.foundation.recipe import RECIPES, open_recipe
from glmexport.foundation.resources import shipped


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped corpora that a test may damage; the folder of the files."""
    shutil.copytree(shipped("calibration") / "corpora", tmp_path / "calibration" / "corpora")
    monkeypatch.setattr(module, "shipped", lambda folder: tmp_path / folder)
    return tmp_path / "calibration" / "corpora"


def test_every_language_has_both_splits() -> None:
    calibration, evaluation = (
        {document.language for document in shipped_documents(split)} for split in ("calibration", "evaluation")
    )
    assert calibration == evaluation == set(shipped_languages())
    assert shipped_languages() == sorted(calibration)
    assert len(calibration) >= 20 and {"zh", "en"} <= calibration


def test_the_files_are_as_corpora_toml_describes_them() -> None:
    folder = shipped("calibration") / "corpora"
    entries = tomllib.loads((folder / "corpora.toml").read_text(encoding="utf-8"))["corpus"]
    for entry in entries:
        documents = shipped_documents(entry["split"], [entry["language"]])
        assert len(documents) == entry["documents"]
        assert sum(len(document.text) for document in documents) == entry["characters"]
        assert all(document.language == entry["language"] and document.text.strip() for document in documents)
        assert entry["licence"] and entry["source"]
    assert {entry["file"] for entry in entries} == {path.name for path in folder.glob("*.jsonl")}


def test_every_document_has_an_id_of_its_own() -> None:
    for split in ("calibration", "evaluation"):
        ids = [(document.language, document.id) for document in shipped_documents(split)]
        assert len(set(ids)) == len(ids)


def test_calibration_and_evaluation_have_nothing_in_common() -> None:
    found = overlap(shipped_documents("calibration"), shipped_documents("evaluation"))
    assert (found.shared_documents, found.shared_lines) == (0, 0)


def test_every_shipped_recipe_calibrates_on_languages_that_are_there() -> None:
    for name in names(RECIPES):
        plan = open_recipe(name).calibration
        assert plan is None or set(plan.quota) - {module.USER} <= set(shipped_languages())


def test_languages_can_be_chosen() -> None:
    documents = shipped_documents("calibration", ["zh", "en"])
    assert {document.language for document in documents} == {"zh", "en"}
    assert shipped_documents("calibration", []) == []


@pytest.mark.parametrize("damage", ["one letter", "one line less", "one line more"])
def test_a_changed_file_is_refused_by_name(copy: Path, damage: str) -> None:
    path = copy / "zh.evaluation.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if damage == "one letter":
        lines[0] = lines[0].replace("的", "得", 1)
    elif damage == "one line less":
        del lines[-1]
    else:
        lines.append(json.dumps({"id": "new", "text": "new"}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(DefinitionError, match=r"zh\.evaluation\.jsonl is not the file that corpora\.toml describes"):
        shipped_documents("evaluation")
    # Others can still be read.
    assert shipped_documents("evaluation", ["en"])
    assert shipped_documents("calibration", ["zh"])


def test_a_missing_file_is_refused_by_name(copy: Path) -> None:
    (copy / "zh.evaluation.jsonl").unlink()
    with pytest.raises(DefinitionError, match=r"zh\.evaluation\.jsonl"):
        shipped_documents("evaluation")


def test_an_unknown_key_of_corpora_toml_is_refused(copy: Path) -> None:
    path = copy / "corpora.toml"
    path.write_text(path.read_text(encoding="utf-8") + 'weight = "2"\n', encoding="utf-8")
    with pytest.raises(DefinitionError, match=r"corpora\.toml: corpus\.\d+\.weight"):
        shipped_documents("evaluation")


def document(text: str) -> Document:
    return Document("id", "en", text)


def test_overlap_folds_case_and_white_space() -> None:
    one = document("A line that is long enough\tto tell.\nshort")
    same = document("a  LINE that is long enough to tell. \n  Short\n")
    found = overlap([one], [same])
    assert (found.shared_documents, found.shared_lines) == (1, 1)


def test_overlap_counts_lines_of_different_documents() -> None:
    shared = "This very line is in both of them.\n"
    found = overlap([document(shared + "one"), document("x")], [document("two\n" + shared), document("y")])
    assert (found.shared_documents, found.shared_lines) == (0, 1)


def test_short_lines_tell_nothing() -> None:
    found = overlap([document("Introduction\none")], [document("Introduction\ntwo")])
    assert (found.shared_documents, found.shared_lines) == (0, 0)
