"""Embedding and lm_head are one where transformers makes them one, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import TINY, edit_config, edit_tensors, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from glmexport.architecture.registry import FAMILIES
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Silent
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference
from glmexport.validation.texts import EvaluationText
from glmexport.validation.whole_model import check_reference
from glmexport.workflows.original import Original

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
def written(directory: Path, family: str, flag: bool, tables: str) -> Path:
    """A checkpoint that has ``tables``: both the same, two different ones, or one of them only."""
    write_checkpoint(directory, family, **TINY[family])
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if tables == "equal":
        tensors[LM_HEAD] = tensors[EMBEDDING].clone()
    elif tables == "no lm_head":
        del tensors[LM_HEAD]
    elif tables == "no embedding":
        del tensors[EMBEDDING]
    elif tables == "one number apart":
        tensors[LM_HEAD] = tensors[EMBEDDING].clone()
        tensors[LM_HEAD][-1, -1] += 0.125
    save_file(tensors, path, {"format": "pt"})
    edit_config(directory, tie_word_embeddings=flag)
    return directory


def one_text() -> list[EvaluationText]:
    ids = torch.randint(0, 250, (50,), generator=torch.Generator().manual_seed(0))
    return [EvaluationText("text", "en", ids, 1)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("flag", "tables", "tied"),
    [
        (True, "equal", True),
        (True, "different", False),
        (True, "one number apart", False),
        (True, "no lm_head", True),
        (True, "no embedding", True),
        (False, "equal", False),
        (False, "different", False),
    ],
)
def test_the_tables_are_those_of_transformers(
    family: str, flag: bool, tables: str, tied: bool, tmp_path: Path
) -> None:
    directory = written(tmp_path / "checkpoint", family, flag, tables)
    original = Original.open(str(directory), Silent())
    assert original.architecture.tied is tied
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    reference = Reference(original.checkpoint, original.architecture)
    check = check_reference(reference, one_text(), tmp_path, None, Silent())
    assert check.max_difference is not None and check.limit is not None
    assert check.max_difference <= 1e-5 < check.limit
    left_out = {LM_HEAD: "tied to the embedding"} if tied and tables == "equal" else {}
    assert original.unused == left_out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("flag", "tables"), [(False, "no lm_head"), (False, "no embedding")])
def test_a_table_that_is_missing_is_named(family: str, flag: bool, tables: str, tmp_path: Path) -> None:
    directory = written(tmp_path, family, flag, tables)
    missing = LM_HEAD if tables == "no lm_head" else EMBEDDING
    with pytest.raises(CheckpointError, match=f"lacks tensor {missing}"):
        Original.open(str(directory), Silent())


def test_a_flag_that_does_not_describe_the_tables_is_told(tmp_path: Path) -> None:
    told = Silent()
    Original.open(str(written(tmp_path / "apart", "glm", True, "different")), told)
    assert any("tie_word_embeddings" in remark and "both are used" in remark for remark in told.remarks)
    told = Silent()
    Original.open(str(written(tmp_path / "tied", "glm", True, "equal")), told)
    assert not told.remarks


def test_tables_of_other_widths_are_two(tmp_path: Path) -> None:
    directory = written(tmp_path, "glm", True, "different")
    edit_tensors(directory, **{LM_HEAD: torch.zeros(3)})
    checkpoint = Checkpoint.open(directory)
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[3\]"):
        describe(checkpoint).account(checkpoint)
