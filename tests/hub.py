"""Bundles in the cache of the hub's client, where files are links."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


def cached(bundle: Path, cache: Path, *, shared: bool) -> Path:
    """The snapshot of a bundle as the hub's client lays it out; ``shared``: its weights in the store of all."""
    repository = cache / "models--acme--tiny-onnx"
    snapshot, blobs = repository / "snapshots" / REVISION, repository / "blobs"
    blobs.mkdir(parents=True)
    for path in (path for path in bundle.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        blob = blobs / digest
        if shared and path.suffix == ".data":
            store = cache / "blobs" / digest[:2]
            store.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, store / digest)
            blob.symlink_to(f"../../blobs/{digest[:2]}/{digest}")
        else:
            shutil.copyfile(path, blob)
        link.symlink_to(Path(*[".."] * len(link.relative_to(repository).parts[:-1])) / "blobs" / digest)
    return snapshot
