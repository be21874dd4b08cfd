"""Opening a checkpoint: which files it has, whether they agree, and its digest."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import INDEX, write_checkpoint, write_json, write_tokenizer

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Silent

A, B = torch.arange(6.0).reshape(3, 2), torch.ones(4, dtype=torch.bfloat16)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {FIRST: {"a": A}, SECOND: {"b": B}}
WEIGHT_MAP = {"a": FIRST, "b": SECOND}


def test_a_single_file_is_opened(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "tiny"))
    assert (checkpoint.name, checkpoint.model_type, checkpoint.path) == ("tiny", "glm4", tmp_path / "tiny")
    assert list(checkpoint.tensors) == ["a", "b"]
    assert (checkpoint.parameters, checkpoint.bytes, checkpoint.shape("a")) == (10, 40, (3, 2))
    assert checkpoint.generation_config is None


@pytest.mark.parametrize("index", [WEIGHT_MAP, None])
def test_shards_are_opened_with_and_without_an_index(index: dict[str, str] | None, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, SHARDS, index))
    assert torch.equal(checkpoint.read("b"), B.float())
    assert [path.name for path in checkpoint.shards] == [FIRST, SECOND]


def test_the_generation_config_is_read_where_there_is_one(tmp_path: Path) -> None:
    write_json(write_checkpoint(tmp_path) / "generation_config.json", {"eos_token_id": [7, 8]})
    generation_config = Checkpoint.open(str(tmp_path)).generation_config
    assert generation_config is not None
    assert generation_config.integers("eos_token_id") == (7, 8)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {FIRST: {"a": A}}, WEIGHT_MAP)
    with pytest.raises(CheckpointError, match=f"1 of 2 shards .*{INDEX} names are missing: {SECOND}"):
        Checkpoint.open(tmp_path)


def test_a_gap_in_the_numbering_is_found_without_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {FIRST: {"a": A}})
    with pytest.raises(CheckpointError, match=f"{SECOND} is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors", "a\n.safetensors"],
)
def test_an_index_cannot_leave_the_directory(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "outer", {"x.safetensors": {"a": A}})
    write_checkpoint(tmp_path / "outer" / "inner", {}, {"a": name})
    with pytest.raises(CheckpointError, match=r"index\.json names .* not a relative path inside") as refusal:
        Checkpoint.open(tmp_path / "outer" / "inner")
    assert repr(name) in refusal.value.message


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": FIRST, "b": "weights.bin"},
            "places tensor 'b' in 'weights.bin', which is no safetensors file",
        ),
        ({"a": FIRST, "b": 3}, "places tensor 'b' in 3, which is no safetensors file"),
        ({}, "has no weight_map"),
        (["a"], "has no weight_map"),
    ],
)
def test_an_index_that_is_none_is_refused(weight_map: object, message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SHARDS)
    write_json(tmp_path / INDEX, {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match=message) as refusal:
        Checkpoint.open(tmp_path)
    assert str(tmp_path / INDEX) in refusal.value.message


@pytest.mark.parametrize(
    ("weight_map", "told", "absent"),
    [
        ({"a": FIRST, "b": FIRST, "x": SECOND}, f"b is in {SECOND}", set()),
        ({"a": FIRST, "b": SECOND, "x": SECOND, "c": SECOND}, "c is in no file", {"c"}),
        ({"a": FIRST, "b": SECOND}, f"x of {SECOND} is not named", set()),
        ({"a": FIRST, "b": SECOND, "x": SECOND}, None, set()),
    ],
)
def test_the_shards_tell_what_they_have_and_another_index_is_remarked(
    weight_map: dict[str, str], told: str | None, absent: set[str], tmp_path: Path
) -> None:
    progress = Silent()
    write_checkpoint(tmp_path, {FIRST: {"a": A}, SECOND: {"b": B, "x": A.clone()}}, weight_map)
    checkpoint = Checkpoint.open(tmp_path, progress)
    assert set(checkpoint.tensors) == {"a", "b", "x"} and checkpoint.absent == absent
    assert len(progress.remarks) == (told is not None) and all(told in remark for remark in progress.remarks if told)


@pytest.mark.parametrize("index", [WEIGHT_MAP, None])
def test_a_tensor_in_two_shards_is_refused(index: dict[str, str] | None, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {FIRST: {"a": A}, SECOND: {"a": A, "b": B}}, index)
    with pytest.raises(CheckpointError, match=f"Tensor 'a' is in two shards: .*{FIRST} and .*{SECOND}"):
        Checkpoint.open(tmp_path)


def test_two_sets_of_weights_are_refused_and_extra_files_remarked(tmp_path: Path) -> None:
    progress = Silent()
    write_checkpoint(tmp_path, {**SHARDS, "consolidated.safetensors": {"z": A}}, WEIGHT_MAP)
    assert list(Checkpoint.open(tmp_path, progress).tensors) == ["a", "b"]
    assert len(progress.remarks) == 1
    assert "consolidated.safetensors" in progress.remarks[0]
    write_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"two sets of weights: model\.safetensors, and"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_directory_is_refused(missing: str, tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / missing).unlink()
    with pytest.raises(CheckpointError, match=r"config\.json|no weights: no \*\.safetensors") as refusal:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in refusal.value.message


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    directory = write_tokenizer(write_checkpoint(tmp_path / "inside"))
    (directory / name).rename(tmp_path / name)
    (directory / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is a link to .* outside of the checkpoint") as refusal:
        Checkpoint.open(directory).digest()
    assert f"cp -rL {directory} COPY" in refusal.value.next_step
    # What it says works.
    shutil.copytree(directory, tmp_path / "copy")
    Checkpoint.open(tmp_path / "copy").digest()


def test_links_inside_of_the_checkpoint_are_followed_and_broken_ones_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.rename(tmp_path / "data")
    path.symlink_to("data")
    assert torch.equal(Checkpoint.open(tmp_path).read("a"), A)
    (tmp_path / "data").unlink()
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors, named by .*, is a link to a file that does not exist"
    ):
        Checkpoint.open(tmp_path)
    path.unlink()
    path.symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_directory_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors, named by .*, is not an existing file"):
        Checkpoint.open(tmp_path)


def test_the_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first = write_tokenizer(write_checkpoint(tmp_path / "first", SHARDS, WEIGHT_MAP))
    second = tmp_path / "second"
    shutil.copytree(first, second)
    (second / "README.md").write_text("not part of it")
    digest = Checkpoint.open(first).digest()
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
    assert Checkpoint.open(second).digest() == digest
    seen = {digest}
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        before = (second / name).read_text() if (second / name).exists() else ""
        (second / name).write_text(before + " " if before else "{}")
        seen.add(Checkpoint.open(second).digest())
    write_checkpoint(second, {FIRST: {"a": A + 1}, SECOND: {"b": B}}, WEIGHT_MAP)
    seen.add(Checkpoint.open(second).digest())
    assert len(seen) == 7


def test_the_digest_is_taken_once_and_reports_every_byte(tmp_path: Path) -> None:
    class Watched(Silent):
        done = total = 0

        def track(self, label: str, total: int) -> Any:
            self.total += total
            context = super().track(label, total)
            advance = self

            class Counting:
                def __enter__(self) -> Counting:
                    context.__enter__()
                    return self

                def __exit__(self, *error: object) -> None:
                    context.__exit__(None, None, None)

                def advance(self, steps: int = 1, detail: str = "") -> None:
                    advance.done += steps

            return Counting()

    progress = Watched()
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path))
    digest = checkpoint.digest(progress)
    size = sum((tmp_path / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert progress.done == progress.total == size
    (tmp_path / "config.json").unlink()
    assert checkpoint.digest(progress) == digest
    assert progress.done == size
