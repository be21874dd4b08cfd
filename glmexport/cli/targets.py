"""``glmexport targets``: what is known about hardware."""

from __future__ import annotations

import json

import click
from rich.table import Table

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import json_option


@click.group()
def targets() -> None:
    """What classes of hardware bundles can be built for."""


@targets.command("list")
@json_option
def list_targets(as_json: bool) -> None:
    """Names of the shipped targets, and which of them this host is."""
    from glmexport.errors import DefinitionError
    from glmexport.target import HOST, open_target, shipped_targets

    try:
        host = open_target(HOST).name
    except DefinitionError:
        host = ""
    known = shipped_targets()
    if as_json:
        emit(json.dumps({"host": host or None, "targets": [target.name for target in known]}, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("target", "what it is", "default recipe", ""):
        table.add_column(column)
    for target in known:
        here = "this host" if target.name == host else ""
        table.add_row(target.name, target.summary, target.weights.default_recipe, here)
    Terminal().console.print(table)


@targets.command("show")
@click.argument("name")
@json_option
def show_target(name: str, as_json: bool) -> None:
    """Everything a target claims. NAME is a shipped target, a .toml file, or host."""
    from glmexport.target import open_target

    target = open_target(name)
    if as_json:
        emit(target.model_dump_json(indent=2))
        return
    facts = {"summary": target.summary}
    for section, values in target.model_dump(exclude={"evidence": {"candidates"}}).items():
        if isinstance(values, dict):
            facts |= {f"{section}.{key}": _shown(value) for key, value in values.items()}
    Terminal().facts(target.name, facts)


def _shown(value: object) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(str(item) for item in value)
    return str(value)
