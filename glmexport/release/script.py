"""The verifier as one file that needs Python and openssl alone: signed bundles and kits carry it as verify.py."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

from glmexport.release import certificates, envelope, verifier

_FUTURE = "from __future__ import annotations\n"


def verifier_script() -> str:
    """Return the source of verify.py: the verifier, with its parts in place of the lines that import them."""
    lines = _source(verifier).splitlines(keepends=True)
    parts = {part.__name__: part for part in (certificates, envelope)}
    imports = [each for each in ast.parse("".join(lines)).body if isinstance(each, ast.ImportFrom)]
    for statement in reversed([each for each in imports if each.module in parts]):
        body = _source(parts[str(statement.module)]).partition(_FUTURE)[2]
        lines[statement.lineno - 1 : statement.end_lineno] = [f"{body.strip()}\n\n\n"]
    return "".join(lines)


def _source(module: ModuleType) -> str:
    assert module.__file__
    return Path(module.__file__).read_text(encoding="utf-8")
