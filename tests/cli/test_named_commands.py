"""Every command and option that a text of the package names is one that there is."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import glmexport
from glmexport.cli.main import cli

PACKAGE = Path(glmexport.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
BENCHMARKS = sorted((PACKAGE.parent / "benchmarks").rglob("*.py"))
#: Options of other programs that texts name, by program.
OTHERS = {
    "lm-eval": {"--model", "--model_args", "--tasks", "--batch_size", "--include_path", "--apply_chat_template"},
    "mlx_lm.convert": {"--dequantize"},
    "pip": {"--index-url"},
    "systemctl": {"--now"},
    "the program that is sent to a device": {"--attended", "--emulated", "--missing"},
}
#: Words that follow the program's name in a sentence and are no commands.
PROSE = {"again", "bundle", "does", "knows", "of", "reads", "runs", "that", "was"}
#: What stands for a value in a text that is put together.
VALUE = "VALUE"
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
COMMAND = re.compile(r"\bglmexport ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)?)([^.;'\"`\n]*)")


def commands(command: click.Command = cli, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its words, and the groups."""
    yield path, command
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from commands(each, f"{path} {name}".strip())


COMMANDS = dict(commands())


def options(command: click.Command) -> set[str]:
    return {"--help", *(name for each in command.params for name in (*each.opts, *each.secondary_opts))}


def texts(path: Path) -> Iterator[str]:
    """Yield every literal with a space in it; what has none is an argument or a declaration, and no text.

    Of docstrings, which speak of the program in sentences, only what is marked as code, or indented, is yielded. Those
    of cli are help texts, and are yielded whole.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    if path.is_relative_to(PACKAGE / "cli"):
        docstrings.clear()
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            text = node.value
        if id(node) in docstrings:
            yield from re.findall(r"``[^`]+``|^ {4,}.+$", inspect.cleandoc(text), re.MULTILINE)
        elif " " in text:
            yield text


def named_command(words: str) -> click.Command | None:
    """Return the command that a text names; None for a sentence about the program.

    Raises:
        AssertionError: there is no such command.
    """
    first = words.partition(" ")[0]
    if first in PROSE:
        return None
    assert first in COMMANDS, f"there is no glmexport {first}"
    if not isinstance(COMMANDS[first], click.Group):
        return COMMANDS[first]
    assert words in COMMANDS, f"there is no glmexport {words}"
    return COMMANDS[words]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_options(path: Path) -> None:
    known = set().union(*map(options, COMMANDS.values()), *OTHERS.values())
    assert {name for text in texts(path) for name in OPTION.findall(text)} <= known


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_commands_and_their_options(path: Path) -> None:
    for text in texts(path):
        for words, rest in COMMAND.findall(text):
            command = named_command(words)
            if command is not None:
                assert set(OPTION.findall(rest)) <= options(command), text


def test_what_follows_the_program_s_name() -> None:
    assert named_command("knows nothing") is None
    assert named_command("build it") is COMMANDS["build"]
    assert named_command("targets list") is COMMANDS["targets list"]
    assert named_command("targets") is COMMANDS["targets"]
    for words in ("bulid", "bulid it", "targets lost"):
        with pytest.raises(AssertionError, match="there is no"):
            named_command(words)


def imported(path: Path) -> Iterator[Path]:
    """Yield a benchmark, and the benchmarks that it imports from, whose options may be its own."""
    yield path
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
            yield from PACKAGE.parent.glob(f"{str(node.module).replace('.', '/')}.py")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.relative_to(PACKAGE.parent).as_posix())
def test_the_usage_of_a_benchmark(path: Path) -> None:
    """Its first text names options that it declares."""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    usage = " ".join(re.findall(r"\bpython (?:-m )?[\w.]+[^`\n]*", said))
    declared = {
        node.value
        for each in imported(path)
        for node in ast.walk(ast.parse(each.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
    }
    assert set(OPTION.findall(usage)) <= declared
