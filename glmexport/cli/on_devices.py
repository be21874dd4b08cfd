"""``glmexport validate --device`` and ``--fleet``: the same on other machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmexport.cli.console import Terminal, emit
from glmexport.foundation.errors import EXIT_PASS

if TYPE_CHECKING:
    from glmexport.bundle.bundle import Bundle
    from glmexport.devices.fleet import Member
    from glmexport.validation.capture import CapturedReference
    from glmexport.workflows.original import Original
    from glmexport.workflows.validate import BuildOptions


def on_devices(
    bundle: Bundle,
    original: Original | CapturedReference,
    addresses: tuple[str, ...],
    fleet: Path | None,
    threads: int | None,
    options: BuildOptions,
    terminal: Terminal,
    as_json: bool,
) -> int:
    """Write the kits that are asked for, have all other devices answer, and show what they did."""
    from glmexport.cli.verdict import exit_code, show
    from glmexport.devices.kit import KIT, KIT_RESULT
    from glmexport.workflows.fleet import discard, locked, prepare_job, validate_on_devices, write_kits
    from glmexport.workflows.original import Original

    kits = [Path(address.removeprefix(KIT)) for address in addresses if address.startswith(KIT)]
    carried = [address for address in addresses if address.startswith((KIT, KIT_RESULT))]
    if carried and isinstance(original, Original):
        raise click.UsageError(
            f"{carried[0]} needs --reference: what is brought back has to find the same questions. Capture them with "
            "glmexport reference."
        )
    # Before anything is computed: a name that is none should not take minutes to tell.
    members = _members([address for address in addresses if not address.startswith(KIT)], fleet)
    with locked(bundle):
        asking = prepare_job(bundle, original, options, threads, terminal)
        try:
            write_kits(asking, kits, terminal)
        except BaseException:
            discard(asking)
            raise
        for kit in kits:
            terminal.remark(
                f"{kit} is to be carried to the device; what it brings back is read with --device {KIT_RESULT}FILE."
            )
        if not members:
            discard(asking)
            if as_json:
                emit(json.dumps({"kits": [str(kit) for kit in kits]}, indent=2))
            return EXIT_PASS
        built = validate_on_devices(asking, members, terminal)
    show(terminal.console, built.report, bundle.directory)
    if as_json:
        emit(built.report.model_dump_json(indent=2))
    return exit_code([built.report.verdict])


def _members(addresses: list[str], fleet: Path | None) -> list[Member]:
    from glmexport.devices.emulated import QEMU_ARM64
    from glmexport.devices.fleet import Member, open_device, open_fleet

    members = open_fleet(fleet) if fleet else []
    for address in addresses:
        # Where its files are is nothing for a report.
        name = QEMU_ARM64 if address.startswith(f"{QEMU_ARM64}:") else address
        members.append(Member(name, name, open_device(address)))
    names = [member.name for member in members]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"{name} is asked twice.")
    return members
