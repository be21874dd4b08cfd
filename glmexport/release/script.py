"""The verifier as one file that needs Python and openssl alone: signed bundles and kits carry it as verify.py."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

from glmexport.release import certificates, encodings, envelope, verifier

_PARTS = (encodings, certificates, envelope)
_FUTURE = "from __future__ import annotations\n"


def verifier_script() -> str:
    """Return the source of verify.py: the verifier, with its parts in place of the lines that import them."""
    return _with_parts(verifier, {part.__name__: part for part in _PARTS})


def _with_parts(module: ModuleType, left: dict[str, ModuleType]) -> str:
    """Return the source of ``module`` with parts in place of its imports of them.

    A part is taken out of ``left`` where it is first imported. Later imports of it are left out.
    """
    lines = _source(module).splitlines(keepends=True)
    names = {part.__name__ for part in _PARTS}
    statements = [each for each in ast.parse("".join(lines)).body if isinstance(each, ast.ImportFrom)]
    bodies: dict[tuple[int, int | None], str] = {}
    for statement in [each for each in statements if each.module in names]:
        part = left.pop(str(statement.module), None)
        text = "" if part is None else _with_parts(part, left).partition(_FUTURE)[2].strip() + "\n\n\n"
        bodies[statement.lineno - 1, statement.end_lineno] = text
    for (start, end), text in reversed(bodies.items()):
        lines[start:end] = [text]
    return "".join(lines)


def _source(module: ModuleType) -> str:
    assert module.__file__
    return Path(module.__file__).read_text(encoding="utf-8")
