"""A checkpoint of the hub: from its cache, from a hub of our own, and every way in which neither has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import COMMIT, FakeHub, fill_cache
from huggingface_hub import constants

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.checkpoint.source import resolve
from glmexport.foundation.errors import CheckpointError, MachineError


@pytest.mark.parametrize(
    "source",
    [
        "/no/such/directory",
        "./tiny",
        "../acme/tiny",
        "tiny",
        "a/b/c",
        "acme/tiny/",
        "acme/ti ny",
        "",
        "acme/tiny@../x",
        "a\\b",
        "https://hub/acme/tiny",
    ],
)
def test_a_path_that_is_missing_never_reaches_the_hub(
    source: str, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    # The empty text is the current directory to Path, and no checkpoint in any case.
    with pytest.raises(CheckpointError, match=r"no directory|is not an existing file") as refusal:
        Checkpoint.open(source)
    assert (source or "config.json") in refusal.value.message.replace("\\\\", "\\")
    assert hub.seen == []


@pytest.mark.parametrize("source", ["acme/tiny", f"acme/tiny@{COMMIT}", "acme/tiny@main"])
def test_a_cached_checkpoint_is_read_offline_through_its_links(source: str, cache: Path) -> None:
    snapshot = fill_cache(cache)
    checkpoint = Checkpoint.open(source)
    assert (checkpoint.path, checkpoint.name) == (snapshot, "acme/tiny")
    assert torch.equal(checkpoint.read("b"), torch.ones(4))


def test_a_link_from_the_cache_into_another_repository_is_refused(cache: Path) -> None:
    other = fill_cache(cache, "models--acme--other") / "model.safetensors"
    (cache / "blobs" / "ab").rename(cache / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open("acme/other")
    other.unlink()
    other.symlink_to(next((cache / "elsewhere").iterdir()))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is a link to .*elsewhere.* outside of the checkpoint"
    ):
        Checkpoint.open("acme/other")


def test_the_environment_of_the_hubs_library_is_honoured(tmp_path: Path) -> None:
    home = tmp_path / "home"
    fill_cache(home / "hub")
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))
    }
    program = "from glmexport.checkpoint.source import resolve; print(resolve('acme/tiny'))"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip().endswith(f"models--acme--tiny/snapshots/{COMMIT}")


def test_offline_and_not_cached_is_the_machines_failure(cache: Path) -> None:
    with pytest.raises(
        MachineError, match=r"acme/tiny@v1 is not complete in .*hub, and HF_HUB_OFFLINE forbids"
    ) as refusal:
        resolve("acme/tiny@v1")
    assert refusal.value.next_step.startswith("Unset HF_HUB_OFFLINE, or run `hf download acme/tiny`")


def test_an_unreachable_hub_is_the_machines_failure(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 1 of this machine: refused at once, and nothing leaves.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        MachineError, match=r"http://127\.0\.0\.1:1 cannot be reached\. Check the network, or run"
    ):
        resolve("acme/tiny")


@pytest.mark.parametrize("source", ["acme/tiny", "acme/tiny@v1"])
def test_a_repository_is_downloaded_without_code_and_pickles(source: str, hub: FakeHub, cache: Path) -> None:
    checkpoint = Checkpoint.open(source)
    assert sorted(path.name for path in checkpoint.path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
    ]
    assert checkpoint.name == "acme/tiny"
    assert torch.equal(checkpoint.read("b"), torch.ones(4))
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert not any("torch" in text for text in hub.user_agents)
    assert all(path.startswith(("/api/models/acme/tiny", "/acme/tiny")) for path in hub.seen)


@pytest.mark.parametrize(
    ("refusal", "source", "expected", "message"),
    [
        (
            (403, "GatedRepo"),
            "acme/tiny",
            CheckpointError,
            "acme/tiny is gated on the hub.*Accept its licence at http.*/acme/tiny",
        ),
        (
            (401, "RepoNotFound"),
            "acme/tiny",
            CheckpointError,
            "no directory 'acme/tiny', and the hub has no such repository",
        ),
        (
            None,
            "acme/other",
            CheckpointError,
            "no directory 'acme/other', and the hub has no such repository",
        ),
        (None, "acme/tiny@v9", CheckpointError, "acme/tiny has no revision 'v9'"),
        (None, "acme/ti--ny", CheckpointError, "'acme/ti--ny' is no hub id"),
        (
            (500, ""),
            "acme/tiny",
            MachineError,
            "acme/tiny is not complete in the hub's cache.* cannot be reached",
        ),
    ],
)
def test_a_refusal_of_the_hub_is_told_by_kind(
    refusal: tuple[int, str] | None, source: str, expected: type[Exception], message: str, hub: FakeHub
) -> None:
    hub.refusal = refusal
    with pytest.raises(expected, match=message):
        resolve(source)


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            OSError(28, "No space left on device", "/cache/blob"),
            MachineError,
            "/cache/blob cannot be read: No space left",
        ),
        (
            RuntimeError("data transfer\nsecond line"),
            MachineError,
            "RuntimeError: data transfer. Check the network",
        ),
    ],
)
def test_a_download_that_breaks_is_the_machines_failure(
    raised: Exception, expected: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(expected, match=message):
        resolve("acme/tiny")
