"""Bundles as an attacker makes them: a file is changed, and the manifest says that it has to be so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmexport.bundle.manifest import MANIFEST


def forge(bundle: Path, name: str, change: Callable[[Any], object]) -> None:
    """Change a file of a bundle and its entry in the manifest.

    ``change`` is given the document of a JSON file, which it alters, or None; bytes that it returns are the file's.
    """
    path = bundle / name
    document = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else None
    content = change(document)
    path.write_bytes(content if isinstance(content, bytes) else (json.dumps(document, indent=2) + "\n").encode())
    if name != MANIFEST:
        written = path.read_bytes()

        def restate(manifest: Any) -> None:
            (entry,) = [each for each in manifest["files"] if each["path"] == name]
            entry.update(size=len(written), sha256=hashlib.sha256(written).hexdigest())

        forge(bundle, MANIFEST, restate)
