"""A tokenizer of another model beside a checkpoint: each command that opens it refuses it before anything is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import TARGET, Run, build, small_checkpoint, write_recipe
from models import edit_config
from test_bad_input import check
from transformers import AutoTokenizer

import glmexport.workflows.build
from benchmarks.synthetic import fill_tokenizer
from glmexport.demo import demo_checkpoint
from glmexport.foundation.errors import EXIT_INPUT
from glmexport.tokenizer.tokenizer import Tokenizer

TOKENS = 262


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer has a token for 87 % of its rows."""
    directory = tmp_path_factory.mktemp("larger") / "checkpoint"
    small_checkpoint(directory, vocab_size=300)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    small_checkpoint(directory)
    return directory


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def every_command(checkpoint: Path, bundle: Path, folder: Path) -> dict[str, tuple[object, ...]]:
    return {
        "inspect": ("inspect", checkpoint),
        "build": ("build", checkpoint, "--target", TARGET, "-o", folder / "out"),
        "reference": ("reference", checkpoint, "-o", folder / "out"),
        "validate": ("validate", bundle, "--against", checkpoint),
        "convert": ("convert", bundle, "--against", checkpoint, "--to", "gptq", "-o", folder / "out"),
    }


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glmexport.workflows.build, "measure_and_report", lambda *_: None)
        (built,) = build(source, folder / "bundle", write_recipe(folder))
    return Path(built.directory)


COMMANDS = ("inspect", "build", "reference", "validate", "convert")


@pytest.mark.parametrize("command", COMMANDS)
def test_far_fewer_tokens_than_rows_are_refused(
    larger: Path, bundle: Path, tmp_path: Path, run: Run, command: str
) -> None:
    outcome = run(*every_command(larger, bundle, tmp_path)[command])
    check(outcome, EXIT_INPUT, f"the tokenizer has {TOKENS} tokens, 87.3% of the 300", "90%", "tokenizer.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_tokens_that_it_does_not_have_are_refused(
    copied: Path, bundle: Path, tmp_path: Path, run: Run, command: str, file: str
) -> None:
    if file == "config.json":
        edit_config(copied, eos_token_id=[256, 263])
        (copied / "generation_config.json").unlink(missing_ok=True)
    else:
        (copied / file).write_text(json.dumps({"eos_token_id": [256, 263]}), encoding="utf-8")
    outcome = run(*every_command(copied, bundle, tmp_path)[command])
    check(outcome, EXIT_INPUT, f"{file}: eos_token_id names 263", "no such token: it has 262, to 261", "eos_token_id")
    assert not (tmp_path / "out").exists()


def test_end_tokens_that_do_not_count_are_left_alone(copied: Path, run: Run) -> None:
    edit_config(copied, eos_token_id=[263])
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}), encoding="utf-8")
    assert run("inspect", copied, "--json").code == 0


@pytest.mark.parametrize(("rows", "code"), [(291, 0), (292, EXIT_INPUT)])
def test_nine_tenths_are_enough(tmp_path: Path, run: Run, rows: int, code: int) -> None:
    small_checkpoint(tmp_path / "checkpoint", vocab_size=rows)
    assert run("inspect", tmp_path / "checkpoint", "--json").code == code


@pytest.mark.parametrize("opened", [Tokenizer.open, AutoTokenizer.from_pretrained])
def test_a_filled_tokenizer_says_what_it_said_before(tmp_path: Path, opened: Callable[[Path], object]) -> None:
    shutil.copytree(demo_checkpoint(), tmp_path / "filled")
    assert fill_tokenizer(tmp_path / "filled") == 0
    assert (tmp_path / "filled" / "tokenizer.json").read_bytes() == (demo_checkpoint() / "tokenizer.json").read_bytes()
    assert fill_tokenizer(tmp_path / "filled", 20_000) == 20_000 - 8192
    before, after = opened(demo_checkpoint()), opened(tmp_path / "filled")
    text = "The sky, <unused 9000> 天空 \n\n<|user|> 12345 für [gMASK]"
    assert before.encode(text) == after.encode(text)  # type: ignore[attr-defined]
    filled = Tokenizer.open(tmp_path / "filled")
    assert filled.tokens == filled.vocabulary_size == 20_000 and filled.has(19_999) and not filled.has(20_000)


def test_a_filled_tokenizer_is_one_of_that_model(larger: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(larger, tmp_path / "filled")
    assert fill_tokenizer(tmp_path / "filled") == 38
    assert run("inspect", tmp_path / "filled", "--json").document["tokenizer"]["vocabulary"] == 300
