"""Assembly of a release from files that were sent and files of other releases, verified before it has its name."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

from glmexport.wire.server.layout import Root, contained, write_json
from glmexport.wire.server.verifying import verify_release
from glmexport.wire.standalone import Failure, Tell

#: linux/fs.h: the clone shares its blocks with the original until one of them is written to.
_FICLONE = 0x40049409
_SHA256 = re.compile(r"[0-9a-f]{64}")


def tell_missing(root: Root, order: dict[str, Any], tell: Tell) -> None:
    """Name every file that has to be sent."""
    if order["release"] in root.names():
        return
    listed = root.listed()
    for entry in checked_files(order):
        there = root.held(entry, listed) is not None
        tell({"event": "there" if there else "missing", "path": entry["path"]})


def checked_files(order: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the files of an order.

    Raises:
        Failure: one of them is not in its folder, comes twice, or has no size or SHA-256.
    """
    files: list[dict[str, Any]] = order["files"]
    for entry in files:
        if not isinstance(entry["path"], str) or not contained(entry["path"]):
            raise Failure("files", f"The order names a file outside of its release: {entry['path']!r}.", "Refuse it.")
        digest, size = entry["sha256"], entry["size"]
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest) or type(size) is not int or size < 0:
            raise Failure("files", f"The order has no SHA-256 or no size for {entry['path']!r}.", "Refuse it.")
    if len({entry["path"] for entry in files}) != len(files):
        raise Failure("files", "The order names a file twice.", "Refuse it.")
    return files


def assemble(root: Root, order: dict[str, Any], tell: Tell) -> None:
    """Put the release of ``order`` together, verify it, and give it its name; nothing to do where it is there."""
    name, partial = order["release"], root.partial(order["release"])
    root.clear()
    if name not in root.names():
        if partial.exists():
            shutil.rmtree(partial)
        files, listed = checked_files(order), root.listed()
        for number, entry in enumerate(files, 1):
            source = root.held(entry, listed)
            if source is None:
                raise Failure("files", f"{entry['path']} was not sent whole.", "Run the same command again.")
            path = partial / entry["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            copy_file(source, path)
            tell({"event": "assembled", "index": number, "of": len(files)})
        try:
            verify_release(partial, root.trust)
        except Failure:
            shutil.rmtree(partial)
            raise
        write_json(root.files / f"{name}.json", files)
        root.keep(name)
    for path in root.incoming.iterdir():
        path.unlink()


def copy_file(source: Path, path: Path) -> None:
    """Write a file of its own with the content of ``source``; on file systems that can, it takes no space.

    No link: neither onnx nor ONNX Runtime reads weights through one.
    """
    import fcntl

    with source.open("rb") as old, path.open("wb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
        shutil.copyfileobj(old, new, 1 << 22)


def free_space(root: Root) -> dict[str, Any]:
    """Return the free bytes and inodes for whoever runs this."""
    found = os.statvfs(root.path)
    return {
        "free_bytes": found.f_bavail * found.f_frsize,
        # Some file systems do not count them.
        "free_inodes": found.f_favail if found.f_files else None,
    }


def received_bytes(root: Root) -> int:
    """Return the bytes that have been sent already, whole or in part."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        total = sum(path.stat().st_size for path in root.incoming.iterdir())
    return total
