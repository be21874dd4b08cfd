"""The shape of the source: rooms import only rooms above them, files stay short, only cli prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import glmexport

PACKAGE = Path(glmexport.__file__).parent
#: The rooms in order: one imports only those above it and itself.
FOUNDATION = ("foundation",)
RUN_WING = (
    "tokenizer", "chat", "bundle", "results", "engine", "report", "release", "wire", "deployment", "serving",
)  # fmt: skip
BUILD_WING = (
    "demo", "checkpoint", "architecture", "reference", "calibration", "formats", "quantization", "graph", "lowering",
    "assembly", "validation", "devices", "tuning",
)  # fmt: skip
CALLED = ("workflows", "cli", "lm_eval")
ROOMS = (*FOUNDATION, *RUN_WING, *BUILD_WING, *CALLED)
#: What only building needs. A machine that runs a bundle has none of it.
BUILDING = frozenset((
    "torch", "transformers", "scipy", "onnx", "onnx_ir", "safetensors", "huggingface_hub", "sacrebleu", "py3langid",
    "tomli_w", "regex", "gptqmodel", "optimum", "lm_eval",
))  # fmt: skip
LONGEST = 400

FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """Return the folder that a file belongs to; the package's own two files belong to cli."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else "cli"


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_file(path: Path) -> None:
    mine = room(path)
    assert mine in ROOMS, f"{mine} has no place in the order"
    legal = {*ROOMS[: ROOMS.index(mine) + 1], "__version__"}
    imported = set(imports(path))
    own = {name.split(".")[1] for name in imported if name.startswith("glmexport.")}
    assert own <= legal, f"{mine} may import {sorted(legal)}"
    if mine in (*FOUNDATION, *RUN_WING):
        assert not BUILDING & {name.split(".")[0] for name in imported}, f"{mine} is in the run wing"
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= LONGEST
    if mine != "cli":
        tree = ast.parse(source)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not {"print"} & names
        assert not {"traceback"} & modules


def test_the_docstring_lists_the_rooms_in_order() -> None:
    text = glmexport.__doc__ or ""
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("    ")]
    assert listed == [*ROOMS]
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {*ROOMS}


def test_help_waits_for_no_library_of_numbers() -> None:
    """What every call of the command line imports."""
    heavy = {"torch", "transformers", "onnx", "onnxruntime"}
    program = f"import sys, glmexport.cli.main; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


REPOSITORY = PACKAGE.parent
PROGRAMS = [*FILES, *(path for top in ("tests", "benchmarks") for path in sorted((REPOSITORY / top).rglob("*.py")))]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_private_name_is_imported(path: Path) -> None:
    """A leading underscore says that a name is its own file's."""
    names = [name for name in imports(path) if name.startswith("glmexport.")]
    private = [name for name in names if any(part.startswith("_") and part[:2] != "__" for part in name.split("."))]
    assert private == []


def test_the_tests_are_in_folders_of_the_rooms() -> None:
    """Beside them are what attacks all readers, what runs other projects' tools, and a name that would hide lm_eval."""
    tests = REPOSITORY / "tests"
    folders = {path.parent.relative_to(tests).parts[0] for path in tests.rglob("*.py") if path.parent != tests}
    assert folders <= {*ROOMS, "fuzz", "hostile", "interop", "lm_eval_model"}
    # Files are imported by their own name, whichever folder they are in.
    names = [path.name for path in tests.rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names))
