"""``glmexport devices``: preparation of emulated devices."""

from __future__ import annotations

import json
from pathlib import Path

import click

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import json_option


@click.group()
def devices() -> None:
    """Prepare devices that a bundle can be validated on (validate --device, --fleet)."""


@devices.command()
@click.argument("kind", type=click.Choice(["qemu-arm64"]))
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@json_option
def prepare(kind: str, directory: Path | None, as_json: bool) -> None:
    """Make the files of an emulated arm64 machine, by apt and pip, for validate --device qemu-arm64[:DIRECTORY].

    Debian's packages of Python and the wheels of numpy and onnxruntime for that architecture, about 200 MB, go into
    DIRECTORY (by default into the user's cache). Needs Debian or Ubuntu, but no root, and qemu-user-static to use them.
    """
    from glmexport.devices.emulated import default_sysroot
    from glmexport.devices.emulated import prepare as fetch

    terminal = Terminal()
    versions = fetch(directory, terminal)
    place = directory or default_sysroot()
    terminal.facts("Emulated machine", {"kind": kind, "directory": str(place), **versions})
    if as_json:
        emit(json.dumps({"kind": kind, "directory": str(place), "versions": versions}, indent=2))
