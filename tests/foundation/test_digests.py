"""Digests that are kept: nothing that did not change is read twice, and nothing that did change is missed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from glmexport.foundation.cache import cache_folder
from glmexport.foundation.digests import files_digest, forget_digests
from glmexport.foundation.errors import MachineError
from glmexport.foundation.progress import Silent, Track

LARGE = 1 << 20
#: What the clock is put on by, so that files written just now are old enough.
LATER_NS = 10**10


class Watched(Silent):
    """Counts the bytes that a digest reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.total = 0

    def track(self, label: str, total: int) -> AbstractContextManager[Track]:
        self.total += total
        return _Counting(self)


class _Counting:
    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def __enter__(self) -> _Counting:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._watched.read += steps


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "glmexport"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written just now count as old."""
    now = time.time_ns
    monkeypatch.setattr("glmexport.foundation.digests.time.time_ns", lambda: now() + LATER_NS)


def write(path: Path, size: int = LARGE, fill: bytes = b"a") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(fill * size)
    return path


def digest_of(*paths: Path) -> tuple[str, int]:
    """The digest, and how many bytes were read for it."""
    watched = Watched()
    digest = files_digest(paths[0].parent, paths, "Digest", watched)
    assert watched.read == watched.total
    return digest, watched.read


def true_digest(*paths: Path) -> str:
    lines = "".join(
        f"{path.name}\t{path.stat().st_size}\t{hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for path in sorted(paths)
    )
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


@pytest.mark.usefixtures("settled")
def test_a_large_file_is_read_once_and_a_small_one_every_time(tmp_path: Path) -> None:
    paths = write(tmp_path / "files" / "large"), write(tmp_path / "files" / "small", 100)
    digest, read = digest_of(*paths)
    assert (digest, read) == (true_digest(*paths), LARGE + 100)
    assert digest_of(*paths) == (digest, 100)


def changed_in_place(path: Path) -> None:
    """Same size, inode, and time of the last change; only the inode's own time tells."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"b")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (status.st_mtime_ns, status.st_ino)


def replaced(path: Path) -> None:
    other = write(path.with_name("other"), fill=b"b")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


def grown(path: Path) -> None:
    status = path.stat()
    with path.open("ab") as file:
        file.write(b"b")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", [changed_in_place, replaced, grown])
def test_a_change_is_noticed(tmp_path: Path, change: Any) -> None:
    path = write(tmp_path / "large")
    before, _ = digest_of(path)
    # The clock of a file system may tick as slowly as a hundred times a second.
    time.sleep(0.02)
    change(path)
    after, read = digest_of(path)
    assert (after, read) == (true_digest(path), path.stat().st_size)
    assert after != before


def test_what_was_written_just_before_is_not_kept(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "large")
    assert digest_of(path) == (true_digest(path), LARGE)
    assert not cache.exists()
    # Nor is a file whose time of change was set back: it was written all the same.
    os.utime(path, ns=(0, 0))
    digest_of(path)
    assert not cache.exists()


@pytest.mark.usefixtures("settled")
def test_what_changes_while_it_is_read_is_not_kept(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "large")

    class Meddling(Watched):
        def track(self, label: str, total: int) -> AbstractContextManager[Track]:
            class Counting(_Counting):
                def advance(self, steps: int = 1, detail: str = "") -> None:
                    os.utime(path, ns=(5, 5))

            return Counting(self)

    files_digest(tmp_path, [path], "Digest", Meddling())
    assert not cache.exists()
    files_digest(tmp_path, [path], "Digest", Watched())
    assert cache.exists()


@pytest.mark.usefixtures("settled")
def test_a_link_and_its_file_are_one(tmp_path: Path) -> None:
    path = write(tmp_path / "blobs" / "large")
    link = tmp_path / "snapshot" / "model"
    link.parent.mkdir()
    link.symlink_to(path)
    digest_of(path)
    watched = Watched()
    files_digest(link.parent, [link], "Digest", watched)
    assert watched.read == 0
    other = write(tmp_path / "blobs" / "other", fill=b"b")
    link.unlink()
    link.symlink_to(other)
    assert files_digest(link.parent, [link], "Digest", watched) != digest_of(path)[0]
    assert watched.read == LARGE


def entry_of(path: Path) -> dict[str, object]:
    status = path.stat()
    return {
        "path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino, "sha256": "0" * 64,
    }  # fmt: skip


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda content: content[: len(content) // 2],
        lambda _: b'{"files": 7}',
        lambda content: content.replace(b'"sha256":"', b'"sha256":"g'),
        lambda content: content.replace(b'"files"', b'"more"'),
        lambda content: content + b" " * (5 << 20),
        lambda _: b"\xff\xfe",
        lambda _: b"[" * 100_000,
    ],
)
def test_a_damaged_document_is_ignored_and_replaced(tmp_path: Path, cache: Path, damage: Any) -> None:
    path = write(tmp_path / "large")
    digest, _ = digest_of(path)
    (document,) = cache.glob("*.json")
    document.write_bytes(damage(document.read_bytes()))
    assert digest_of(path) == (digest, LARGE)
    assert digest_of(path) == (digest, 0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners of files here")
@pytest.mark.usefixtures("settled")
def test_a_document_that_others_may_write_is_not_believed(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "large")
    digest, _ = digest_of(path)
    (document,) = cache.glob("*.json")
    assert stat.S_IMODE(document.stat().st_mode) == 0o600
    document.write_text(json.dumps({"files": [entry_of(path)]}), encoding="utf-8")
    assert digest_of(path)[1] == 0  # Its own user may say anything.
    document.chmod(0o666)
    assert digest_of(path) == (digest, LARGE)


@pytest.mark.usefixtures("settled")
def test_the_document_stays_small(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmexport.foundation.digests._MOST", 3)
    paths = [write(tmp_path / "files" / str(number)) for number in range(5)]
    for path in paths:
        digest_of(path)
    (document,) = cache.glob("*.json")
    kept = json.loads(document.read_text())["files"]
    assert [Path(entry["path"]).name for entry in kept] == ["2", "3", "4"]
    assert [digest_of(path)[1] for path in paths] == [LARGE, LARGE, LARGE, LARGE, LARGE]


@pytest.mark.usefixtures("settled")
def test_a_folder_that_cannot_be_written_costs_the_cache_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "large")
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "a file")))
    progress = Silent()
    digest = files_digest(tmp_path, [path], "Digest", progress)
    assert digest == true_digest(path)
    (remark,) = progress.remarks
    assert "not kept" in remark


def test_a_relative_folder_is_not_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "glmexport"


@pytest.mark.usefixtures("settled")
def test_forgetting_what_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write(tmp_path / "files" / "one"), write(tmp_path / "files" / "two")
    digest_of(*paths)
    forget_digests(paths[:1])
    assert digest_of(*paths) == (true_digest(*paths), LARGE)

    def full(*_: object, **__: object) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glmexport.foundation.cache.tempfile.mkstemp", full)
    forget_digests([tmp_path / "files" / "three"])
    with pytest.raises(MachineError, match="No space left"):
        forget_digests(paths[:1])


WRITER = """
import sys, time
from pathlib import Path
from glmexport.foundation.digests import files_digest, forget_digests

now = time.time_ns
time.time_ns = lambda: now() + 10**10
for path in sys.argv[1:]:
    files_digest(Path(path).parent, [Path(path)], "Digest", None)
"""


def test_two_writers_lose_nothing_of_each_other(tmp_path: Path, cache: Path) -> None:
    paths = [str(write(tmp_path / "files" / str(number), fill=bytes([number]))) for number in range(24)]
    halves = [
        subprocess.Popen([sys.executable, "-c", WRITER, *paths[part::2]], env={**os.environ}) for part in range(2)
    ]
    assert [half.wait() for half in halves] == [0, 0]
    (document,) = cache.glob("*.json")
    kept = {entry["path"]: entry["sha256"] for entry in json.loads(document.read_text())["files"]}
    assert kept == {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}
    assert sorted(path.name for path in cache.iterdir() if path.suffix not in (".json", ".lock")) == []
