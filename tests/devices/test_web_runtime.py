"""onnxruntime-web out of npm's archive: the one release, or a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmexport.devices.web_runtime import ARCHIVE, VERSION, web_runtime
from glmexport.foundation.cache import cache_folder
from glmexport.foundation.errors import InputError, MachineError


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH and a cache with nothing in them."""
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "programs").mkdir()
    return tmp_path / "programs"


def test_without_npm(path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        web_runtime("wasm")
    assert "npm, which would get it, is missing" in caught.value.message
    assert f"npm pack onnxruntime-web@{VERSION}" in caught.value.next_step
    assert str(cache_folder()) in caught.value.next_step


def test_npm_gets_nothing(path: Path) -> None:
    npm = path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n", encoding="utf-8")
    npm.chmod(0o755)
    with pytest.raises(MachineError, match=r"npm cannot get onnxruntime-web .*: npm error code ENOTFOUND"):
        web_runtime("wasm")
    assert list(cache_folder().iterdir()) == []


def test_another_archive_is_refused(path: Path) -> None:
    cache_folder().mkdir(parents=True)
    (cache_folder() / ARCHIVE).write_bytes(b"something else")
    with pytest.raises(MachineError, match=r"is not the release of onnxruntime-web .* its sha512 differs"):
        web_runtime("wasm")


def test_a_folder_without_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"has no {ARCHIVE}"):
        web_runtime("webgpu", tmp_path)
