"""Names and first sentences of docstrings that a reader understands at once."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import glmexport

PACKAGE = Path(glmexport.__file__).parent

#: Names that are vague but have to stay, as ``module.name``.
VAGUE_NAMES: tuple[str, ...] = (
    # The name that a plan of formats is known by.
    "formats.plan.FormatPlan.of",
)

#: Words that no first sentence begins with.
FRAGMENTS = frozenset(
    [
        "As",
        "At",
        "Behind",
        "Between",
        "By",
        "For",
        "From",
        "How",
        "In",
        "Inside",
        "None",
        "Of",
        "On",
        "Ones",
        "Over",
        "Since",
        "Short",
        "That",
        "Theirs",
        "They",
        "Those",
        "To",
        "Until",
        "What",
        "Whatever",
        "When",
        "Where",
        "Which",
        "Who",
        "Whose",
        "Why",
        "With",
        "Without",
    ]
)
#: Words that a name needs an object for.
VAGUE = frozenset(
    [
        "Told",
        "Wish",
        "Wishes",
        "Wrong",
        "Thing",
        "beside",
        "checked",
        "given",
        "harmless",
        "held",
        "kind",
        "knows",
        "lacking",
        "legal",
        "missing",
        "of",
        "parted",
        "placed",
        "reached",
        "shared",
        "shown",
        "sources",
        "tail",
        "told",
        "wrong",
        "written",
    ]
)

#: The same of methods, whose class is a part of the name.
VAGUE_METHODS = frozenset({"of", "told", "wrong"})

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> list[tuple[str, ast.Module]]:
    """Return every module by its dotted name within the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found.append((".".join(part for part in parts if part != "__init__"), ast.parse(path.read_text("utf-8"))))
    return found


MODULES = modules()


def public(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, Documented]]:
    """Yield what is public in ``node``, and in its classes, by dotted names."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield f"{name}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{name}.{child.name}")


def private(module: str, tree: ast.Module) -> Iterator[tuple[str, Documented]]:
    """Yield the classes and functions that ``public`` leaves out: private ones, and those within functions."""
    known = {node for _, node in public(tree, module)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node not in known:
            yield f"{module}:{node.lineno} {node.name}", node


def attributes(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    """Yield the docstrings of the attributes of a module and of its classes: the strings behind assignments."""
    for child, behind in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(child, ast.ClassDef):
            yield from attributes(child, f"{name}.{child.name}")
        elif isinstance(child, ast.Assign | ast.AnnAssign) and isinstance(behind, ast.Expr):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            if isinstance(behind.value, ast.Constant) and isinstance(behind.value.value, str):
                yield f"{name}.{ast.unparse(targets[0])}", behind.value.value


def is_property(node: Documented) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(each).rpartition(".")[2] in ("property", "cached_property") for each in decorators)


def fault_of(docstring: str, *, of_property: bool = False, of_attribute: bool = False) -> str | None:
    """Return what is wrong with the first sentence of a docstring; None if nothing is.

    A property or an attribute may be called by a noun alone. None is the value that a property may begin with.
    """
    first = " ".join(docstring.split("\n\n", maxsplit=1)[0].split())
    words = first.split()
    if words[0].rstrip(",.:;") in FRAGMENTS and not (of_property and words[0] in ("None,", "Since")):
        return f"begins with {words[0]!r}"
    if re.match(r"The same\b", first):
        return "begins with 'The same'"
    if not re.search(r"[.:][\"')]?$", first):
        return "does not end with a full stop or a colon"
    if len(words) < (2 if of_property or of_attribute else 3):
        return "has too few words to be a sentence"
    return None


@pytest.mark.parametrize("module, tree", MODULES, ids=[name for name, _ in MODULES])
def test_a_first_sentence_is_one(module: str, tree: ast.Module) -> None:
    wrong = []
    for name, node in [(module, tree), *public(tree, module), *private(module, tree)]:
        docstring = ast.get_docstring(node)
        fault = fault_of(docstring, of_property=is_property(node)) if docstring else None
        if fault:
            wrong.append(f"{name} {fault}: {docstring.splitlines()[0] if docstring else ''}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module, tree", MODULES, ids=[name for name, _ in MODULES])
def test_an_attribute_is_described_with_a_subject(module: str, tree: ast.Module) -> None:
    faults = {name: (fault_of(text, of_attribute=True), text) for name, text in attributes(tree, module)}
    wrong = [f"{name} {fault}: {text}" for name, (fault, text) in faults.items() if fault]
    assert not wrong, "\n".join(wrong)


SAMPLE = """
A: int = 1
"Of a module."
class Public:
    a: int
    "Of a class."
    b = 2
    c: int
    "Of its end."
    def method(self):
        def inner(): ...
    def _hidden(self): ...
class _Private:
    def method(self): ...
if A:
    def conditional(): ...
"""


def test_every_place_of_a_docstring_is_looked_at() -> None:
    tree = ast.parse(SAMPLE)
    assert list(attributes(tree, "m")) == [
        ("m.A", "Of a module."),
        ("m.Public.a", "Of a class."),
        ("m.Public.c", "Of its end."),
    ]
    assert [name for name, _ in public(tree, "m")] == ["m.Public", "m.Public.method"]
    hidden = sorted(name.rpartition(" ")[2] for name, _ in private("m", tree))
    assert hidden == ["_Private", "_hidden", "conditional", "inner", "method"]


@pytest.mark.parametrize(
    "docstring, fault",
    [
        ("Of the matrix.", "begins with"),
        ("As ``parse``, of a file.", "begins with"),
        ("What a host lacks", "begins with"),
        ("Return the rows", "does not end"),
        ("The same, of a batch.", "begins with"),
        ("The same over the kept rows.", "begins with"),
        ("The rows.", "too few"),
        ("Return the rows of a matrix.\n\nOf the last axis.", None),
        ("A sequence whose\nitems are ids:", None),
    ],
)
def test_a_fragment_is_found(docstring: str, fault: str | None) -> None:
    found = fault_of(docstring)
    assert found is None if fault is None else found is not None and fault in found


def test_an_attribute_needs_no_sentence_but_a_subject() -> None:
    assert fault_of("Largest error.", of_attribute=True) is None
    assert fault_of("None without a budget.", of_property=True) is not None
    assert fault_of("None, or the largest error.", of_property=True) is None
    assert fault_of("None, or the largest error.", of_attribute=True) is not None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_comment_on_a_value_is_no_fragment(path: Path) -> None:
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    first = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if line.startswith("#:") and not before.startswith("#:")
    ]
    fragments = [line for line in first if line.removeprefix("#:").split()[0].rstrip(",.:;") in FRAGMENTS - {"None"}]
    assert not fragments, "\n".join(fragments)


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for module, tree in MODULES:
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert not shared


def test_no_name_is_vague() -> None:
    vague = [
        name
        for module, tree in MODULES
        for name, _ in public(tree, module)
        if name.rpartition(".")[2] in (VAGUE if name.rpartition(".")[0] == module else VAGUE_METHODS)
    ]
    assert sorted(vague) == sorted(VAGUE_NAMES)
