"""The shape of the source: stages import only stages above them, files stay short, only cli prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import glmexport

PACKAGE = Path(glmexport.__file__).parent
STAGES = (
    "checkpoint",
    "architecture",
    "calibration",
    "quantization",
    "graph",
    "lowering",
    "bundle",
    "chat",
    "validation",
    "tuning",
    "report",
    "release",
    "deployment",
    "serving",
)
SHARED = (
    "errors", "definition", "host", "loop", "recipe", "evidence", "target", "resources", "progress", "divergence",
    "languages", "extras", "session_settings", "ssh", "untrusted",
)  # fmt: skip
#: May import anything: they run the stages.
OUTSIDE = (
    "calibrating", "capture", "compile", "convert", "job", "device", "disk", "estimate", "fit", "fleet", "generation",
    "lm_eval", "matching", "plan", "provenance", "tune", "cli", "__main__",
)  # fmt: skip
#: A checkpoint that is shipped as a package, for the stage that opens checkpoints.
ALLOWED = {"checkpoint": ("demo",)}
LONGEST = 400

FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """Stage or module that a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Parts of the package that a file imports, wherever in it; ``__version__`` is no part."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "glmexport" and rest and rest != "__version__":
                yield rest.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_file(path: Path) -> None:
    mine = part(path)
    assert mine in (*STAGES, *SHARED, *OUTSIDE, "demo", "__init__"), f"{mine} is no stage"
    if mine not in OUTSIDE:
        above = STAGES[: STAGES.index(mine)] if mine in STAGES else ()
        legal = {mine, *SHARED, *above, *ALLOWED.get(mine, ())}
        assert set(imports(path)) <= legal, f"{mine} may import {sorted(legal)}"
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= LONGEST
    if mine != "cli":
        tree = ast.parse(source)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not {"print"} & names
        assert not {"traceback"} & modules


def test_the_docstring_lists_the_stages_in_order() -> None:
    text = glmexport.__doc__ or ""
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("    ")]
    assert listed == [*STAGES, "cli"]
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {*STAGES, "cli", "demo", "lm_eval"}


def test_help_waits_for_no_library_of_numbers() -> None:
    """What every call of the command line imports."""
    heavy = {"torch", "transformers", "onnx", "onnxruntime"}
    program = f"import sys, glmexport.cli.main; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
