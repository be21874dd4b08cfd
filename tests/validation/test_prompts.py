"""Prompt parity: the same files give the same tokens, and whatever is changed in them is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import Sample

from glmexport.calibration.corpus import Document, shipped_documents
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.results.prompts import PromptParity
from glmexport.results.record import Verdict
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.gates import prompt_gate
from glmexport.validation.prompts import golden_conversations, golden_prompts, prompt_parity
from glmexport.validation.texts import EvaluationSet

DOCUMENTS = [Document("a", "en", "Take one tablet twice a day."), Document("b", "zh", "每日服用两次，每次一片。")]


@pytest.fixture
def copied(sample: Sample, tmp_path: Path) -> Path:
    """The tokenizer's files of a bundle, to be damaged."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in Tokenizer.open(sample.bundle).files:
        shutil.copy(path, folder / path.name)
    return folder


def parity_of(checkpoint: Path, bundle: Path, documents: list[Document] = DOCUMENTS) -> PromptParity | None:
    evaluation = EvaluationSet(documents, Tokenizer.open(checkpoint))
    return prompt_parity(golden_prompts(Checkpoint.open(checkpoint), evaluation), Tokenizer.open(bundle))


def test_golden_conversations_are_in_every_language() -> None:
    documents = shipped_documents("evaluation")
    conversations = list(golden_conversations(documents))
    languages = {document.language for document in documents}
    assert len(conversations) == 7 * len(languages) and len(languages) == 21
    assert {conversation.language for conversation in conversations} == languages
    assert any("tools" in conversation.variables for conversation in conversations)


def test_a_bundle_s_own_files_are_the_original_s(sample: Sample, copied: Path) -> None:
    parity = parity_of(sample.checkpoint, copied, shipped_documents("evaluation"))
    assert parity is not None
    assert parity.differences == () and parity.compared + parity.refused == 147 and parity.compared > 100
    assert prompt_gate(parity).verdict is Verdict.PASS


def damage_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("<|assistant|>", "<|user|>"), encoding="utf-8")


def damage_space(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")


def break_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}", encoding="utf-8")


def lose_special_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    table["added_tokens"] = [token for token in table["added_tokens"] if token["content"] != "<|user|>"]
    path.write_text(json.dumps(table), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("damage", [damage_template, damage_space, break_template, lose_special_token])
def test_what_is_changed_is_found(damage: Callable[[Path], None], sample: Sample, copied: Path) -> None:
    damage(copied)
    parity = parity_of(sample.checkpoint, copied)
    assert parity is not None and parity.differences
    gate = prompt_gate(parity)
    assert (gate.verdict, gate.value) == (Verdict.BLOCK, len(parity.differences))
    for difference in parity.differences:
        assert difference.expected != difference.given


def test_templates_that_refuse_everything_prove_nothing(sample: Sample, copied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(sample.checkpoint, folder)
    for path in (folder, copied):
        break_template(path)
    parity = parity_of(folder, copied)
    assert parity is not None and (parity.compared, parity.refused) == (0, 14)
    assert prompt_gate(parity).verdict is Verdict.WARN


def test_an_original_that_transformers_cannot_open_warns(
    sample: Sample, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such tokenizer")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    parity = parity_of(sample.checkpoint, copied)
    assert parity is not None and parity.unopened == "ValueError: no such tokenizer"
    gate = prompt_gate(parity)
    assert gate.verdict is Verdict.WARN and "no such tokenizer" in gate.sample


def test_without_a_template_there_is_nothing_to_compare(sample: Sample, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(sample.checkpoint, folder)
    for path in folder.rglob("*.jinja"):
        path.unlink()
    config = folder / "tokenizer_config.json"
    table = json.loads(config.read_text(encoding="utf-8"))
    table.pop("chat_template", None)
    config.write_text(json.dumps(table), encoding="utf-8")
    assert parity_of(folder, folder) is None
