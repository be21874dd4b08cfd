"""A checkpoint is what it was when it was opened, or whatever is made of it is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_builders import UP, factors, write_adapter, write_base
from checkpoint_builders import write_tokenizer

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError

SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "additional_chat_templates/tool_use.jinja", "special_tokens_map.json")  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    write_base(base)
    write_tokenizer(base)
    (base / "generation_config.json").write_text('{"eos_token_id": 1}', encoding="utf-8")
    (base / "special_tokens_map.json").write_text("{}", encoding="utf-8")
    (base / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}", encoding="utf-8")
    return base


def with_the_same_size(path: Path) -> None:
    """Only the content differs: neither the size nor the time."""
    status = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    """By another file of the same size and time."""
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [with_the_same_size, Path.unlink], ids=["changed", "gone"])
@pytest.mark.parametrize("name", SMALL)
def test_a_small_file_is_compared_by_its_content(name: str, change: Callable[[Path], None], directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    checkpoint.refuse_changes()
    change(directory / name)
    for check in (checkpoint.refuse_changes, checkpoint.digest):
        with pytest.raises(CheckpointError, match=re.escape(str(directory / name))) as refusal:
            check()
        assert "run it again" in refusal.value.next_step or "Download" in refusal.value.next_step


@pytest.mark.parametrize("name", ["quantize_config.json", "added_tokens.json", "additional_chat_templates/new.jinja"])
def test_a_file_that_appears_is_told(name: str, directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    (directory / name).write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is new"):
        checkpoint.refuse_changes()


@pytest.mark.parametrize("change", [Path.touch, replaced, Path.unlink], ids=["written", "replaced", "gone"])
def test_weights_are_compared_by_what_the_system_says(change: Callable[[Path], None], directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    (shard,) = checkpoint.shards
    change(shard)
    with pytest.raises(CheckpointError, match=shard.name):
        checkpoint.refuse_changes()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_compared_too(name: str, directory: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(UP))
    checkpoint = Checkpoint.open(directory, adapter=adapter)
    checkpoint.refuse_changes()
    (adapter / name).write_bytes((adapter / name).read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=name):
        checkpoint.refuse_changes()


def test_other_files_may_change(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    (directory / "README.md").write_text("new", encoding="utf-8")
    (directory / "unused.safetensors").write_bytes(b"")
    checkpoint.refuse_changes()
