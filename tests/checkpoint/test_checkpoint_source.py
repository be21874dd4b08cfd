"""A checkpoint on this machine: demo, directories, and what is refused on sight."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from checkpoint_builders import write_checkpoint, write_json

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.checkpoint.source import refuse_hazards, resolve
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Silent


def test_a_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "demo")
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("./demo") == Path("demo")
    assert resolve(f"~/{tmp_path.name}") == tmp_path
    assert Checkpoint.open("./demo").name == Checkpoint.open(Path("demo")).name == "demo"


def test_demo_is_the_embedded_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("glmexport.demo")
    vars(module)["demo_checkpoint"] = lambda: tmp_path / "shipped"
    monkeypatch.setitem(sys.modules, "glmexport.demo", module)
    write_checkpoint(tmp_path / "shipped")
    assert resolve("demo") == tmp_path / "shipped"
    assert Checkpoint.open("demo").name == "demo"


def test_a_file_and_an_unknown_home_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    with pytest.raises(CheckpointError, match=re.escape(f"{path} is a file. Give the directory")):
        resolve(str(path))
    with pytest.raises(CheckpointError, match="~nobody-of-that-name/tiny has no home directory"):
        resolve("~nobody-of-that-name/tiny")
    with pytest.raises(CheckpointError, match="File name too long"):
        resolve("x" * 5000)
    with pytest.raises(CheckpointError, match=re.escape(f"no directory {path}")):
        Checkpoint.open(path)


def test_code_in_the_directory_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "modeling_chatglm.py").write_text("raise SystemExit")
    with pytest.raises(
        CheckpointError, match=r"contains code \(modeling_chatglm\.py\), and code .* is never run"
    ) as refusal:
        Checkpoint.open(directory)
    assert "move modeling_chatglm.py out of the directory" in refusal.value.next_step
    write_json(directory / "config.json", {"model_type": "glm4", "auto_map": {"AutoModel": "modeling_chatglm.X"}})
    with pytest.raises(CheckpointError, match="contains code") as refusal:
        Checkpoint.open(directory)
    assert "trust_remote_code" in refusal.value.next_step
    # What the first of the two says works.
    write_json(directory / "config.json", {"model_type": "glm4"})
    (directory / "modeling_chatglm.py").rename(tmp_path.parent / "modeling_chatglm.py")
    Checkpoint.open(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("table", [{"auto_map": {"AutoModel": "x.Y"}}, {"inner": [{"auto_map": {}}]}])
def test_a_configuration_that_asks_for_code_is_refused(
    name: str, table: dict[str, object], tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path)
    write_json(directory / name, {"model_type": "glm4", **table})
    with pytest.raises(CheckpointError, match=re.escape(f"{directory / name} asks for code (auto_map)")):
        Checkpoint.open(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH", "model.pkl", "model.ckpt"])
def test_pickles_are_ignored_beside_safetensors_and_refused_without(name: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / name).write_bytes(b"\x80\x04.")
    progress = Silent()
    Checkpoint.open(directory, progress)
    assert progress.remarks == [f"Ignored in {directory}: {name}; only safetensors are read."]
    (directory / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=rf"are pickles \({re.escape(name)}\).*Convert them to safetensors"
    ):
        refuse_hazards(directory)
