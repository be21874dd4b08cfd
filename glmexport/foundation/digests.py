"""Digests of files; those of large ones are kept between commands, so that what did not change is read once.

A file is taken to be what it was if its real path, size, inode, and times of the last change of content and of inode
are. The last of these no program can set back. A digest is not kept of a file that changed within the seconds before
it was read: on many file systems a second change within the same tick of the clock would not show (git's "racy"
entries). Whoever verifies what others signed forgets what is kept and reads every byte.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from glmexport.foundation.cache import CacheFile
from glmexport.foundation.definition import Count, Definition
from glmexport.foundation.errors import MachineError
from glmexport.foundation.files import unreadable, version
from glmexport.foundation.progress import Progress, Silent, Track

_CHUNK_BYTES = 8 << 20
#: Smaller files are read faster than looked up.
_KEPT_BYTES = 1 << 20
#: Time that a file has to have been as it is, ns; the coarsest clock of a file system in use (FAT) ticks every 2 s.
_SETTLED_NS = 3 * 10**9
#: Most files whose digests are kept, and the longest path in bytes: the document stays below what is read of one.
_MOST, _LONGEST_PATH = 2048, 1024


class _KeptDigest(Definition):
    """The digest of a file, and the state of the file that it holds for."""

    path: Annotated[str, Field(min_length=1)]
    size: Count
    mtime_ns: int
    ctime_ns: int
    inode: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _KeptDigests(Definition):
    """The digests that are kept, the newest last."""

    files: tuple[_KeptDigest, ...] = ()


_KEPT = CacheFile("digests-1.json", _KeptDigests())


def files_digest(directory: Path, files: Iterable[Path], label: str, progress: Progress | None) -> str:
    """Return ``sha256:`` and the SHA-256 of one line ``NAME\\tBYTES\\tSHA256\\n`` a file, in order of name.

    Args:
        directory: What the names are relative to.
        files: Files in it; each is read once, or not at all if its digest is kept.
        label: What the progress is called.
        progress: Receives every byte read, and how many files were not.

    Raises:
        CheckpointError: a file vanished.
        MachineError: a file cannot be read.
    """
    progress = progress or Silent()
    named = sorted((path.relative_to(directory).as_posix(), path) for path in files)
    kept = {entry.path: entry for entry in _KEPT.read().files}
    known: dict[str, _KeptDigest] = {}
    for name, path in named:
        entry = kept.get(os.path.realpath(path))
        if entry is not None and _state(path) == _state_of(entry):
            known[name] = entry
    new: list[_KeptDigest] = []
    lines = hashlib.sha256()
    with progress.track(label, sum(version(path)[0] for name, path in named if name not in known)) as track:
        for name, path in named:
            if entry := known.get(name):
                size, digest = entry.size, entry.sha256
            else:
                size, digest, settled = _read(path, name, track)
                new += [settled] if settled else []
            lines.update(f"{name}\t{size}\t{digest}\n".encode())
    if known:
        progress.remark(f"{label}: {len(known)} of {len(named)} files did not change since they were last read.")
    if new:
        try:
            _KEPT.change(lambda content: _with(content, new))
        except MachineError as error:
            progress.remark(f"{label}: it is not kept, and the next command reads the files again. {error.message}")
    return f"sha256:{lines.hexdigest()}"


def forget_digests(files: Iterable[Path]) -> None:
    """Forget the digests that are kept of ``files``: the next one is of what is read then.

    Raises:
        MachineError: there are some, and they cannot be removed.
    """
    paths = {os.path.realpath(path) for path in files}

    def others(content: _KeptDigests) -> _KeptDigests:
        return _KeptDigests(files=tuple(entry for entry in content.files if entry.path not in paths))

    content = _KEPT.read()
    if others(content) != content:
        _KEPT.change(others)


def _with(content: _KeptDigests, new: list[_KeptDigest]) -> _KeptDigests:
    entries = {entry.path: entry for entry in content.files}
    for entry in new:
        entries.pop(entry.path, None)
        entries[entry.path] = entry
    return _KeptDigests(files=tuple(entries.values())[-_MOST:])


def _read(path: Path, name: str, track: Track) -> tuple[int, str, _KeptDigest | None]:
    """Return size and SHA-256 of what is read of a file, and what may be kept of it."""
    digest, size = hashlib.sha256(), 0
    started, before = time.time_ns(), _state(path)
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                track.advance(len(chunk), name)
    except OSError as error:
        raise unreadable(path, error) from error
    _, mtime, ctime, inode = before
    same = before == _state(path) and before[0] == size
    place = os.path.realpath(path)
    # A path that is no Unicode has no place in a document.
    fits = place.isprintable() and len(place.encode()) <= _LONGEST_PATH
    if size < _KEPT_BYTES or not same or not fits or max(mtime, ctime) > started - _SETTLED_NS:
        return size, digest.hexdigest(), None
    kept = _KeptDigest(path=place, size=size, mtime_ns=mtime, ctime_ns=ctime, inode=inode, sha256=digest.hexdigest())
    return size, digest.hexdigest(), kept


def _state(path: Path) -> tuple[int, int, int, int]:
    """Return size, times of the last change of content and of inode in ns, and inode of a file, links followed."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _state_of(entry: _KeptDigest) -> tuple[int, int, int, int]:
    return entry.size, entry.mtime_ns, entry.ctime_ns, entry.inode
