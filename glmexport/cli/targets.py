"""``glmexport targets``: facts about hardware, and about this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import json_option, trust_options

if TYPE_CHECKING:
    from glmexport.lowering.explain import Lowering
    from glmexport.release.opening import Trust


@click.group()
def targets() -> None:
    """Show what classes of hardware bundles can be built for."""


@targets.command("list")
@json_option
def list_targets(as_json: bool) -> None:
    """List the shipped targets, whether they have run on such hardware, and which of them this host is."""
    from glmexport.foundation.errors import DefinitionError
    from glmexport.foundation.target import HOST, open_target, shipped_targets

    try:
        host = open_target(HOST).name
    except DefinitionError:
        host = ""
    known = shipped_targets()
    if as_json:
        executed = [target.name for target in known if target.provenance.executed]
        names = [target.name for target in known]
        emit(json.dumps({"host": host or None, "targets": names, "executed": executed}, indent=2))
        return
    table = _table("target", "what it is", "default recipe", "executed", "")
    for target in known:
        here = "this host" if target.name == host else ""
        executed_here = "yes" if target.provenance.executed else "no"
        table.add_row(target.name, target.summary, target.weights.default_recipe, executed_here, here)
    Terminal().console.print(table)


@targets.command("show")
@click.argument("name")
@json_option
def show_target(name: str, as_json: bool) -> None:
    """Show what the graphs of a target are made of and why. NAME is a shipped target, a .toml file, or host."""
    from glmexport.foundation.provenance import inherited_claims
    from glmexport.foundation.target import HOST, open_target, target_source
    from glmexport.lowering.explain import lowerings

    target = open_target(name)
    source = target_source(target.name if name == HOST else name)
    decisions = lowerings(target)
    if as_json:
        extends = {"target": source.base, "values": source.inherited, "claims": inherited_claims(source)}
        document = {
            **target.model_dump(mode="json"),
            "lowerings": [_plain(lowering) for lowering in decisions],
            "extends": extends if source.base else None,
        }
        emit(json.dumps(document, indent=2, ensure_ascii=False))
        return
    terminal = Terminal()
    provenance = target.provenance
    facts = {"summary": target.summary, "executed": "yes" if provenance.executed else "no, see below"}
    for section in ("provider", "probe", "session", "gates"):
        values = getattr(target, section).model_dump(exclude_defaults=True)
        facts |= {f"{section}.{key}": _shown(value) for key, value in values.items()}
    if source.base:
        facts |= {
            f"values from {source.base}": _shown(source.inherited),
            f"reasons from {source.base}": _shown(inherited_claims(source)) or "none",
        }
    facts |= {"known from": f"{provenance.measured_on} ({provenance.date})", "notes": provenance.notes or "-"}
    if target.evidence:
        tuned = target.evidence.model_dump(exclude={"candidates"}, exclude_none=True)
        facts |= {f"evidence.{key}": _shown(value) for key, value in tuned.items()}
    terminal.facts(target.name, facts)
    table = _table("lowering", "what the graph gets", "why", "known by", "key")
    for lowering in decisions:
        why, how = (lowering.claim.why, lowering.claim.how) if lowering.claim else ("not stated", "-")
        table.add_row(*(Text(part) for part in (lowering.name, lowering.does, why, how, lowering.key)))
    terminal.console.print(table)
    for sentence in provenance.not_yet:
        terminal.remark(f"not yet possible: {sentence}")


@targets.command("probe")
@json_option
def probe(as_json: bool) -> None:
    """Show what this host is: processor, GPUs, providers, which targets it is of, and what it lacks for the others."""
    from glmexport.foundation.host import Host
    from glmexport.foundation.machine import instruction_sets, processor_name
    from glmexport.foundation.target import host_target, shipped_targets

    host = Host.this()
    lacking = {target.name: target.lacking(host) for target in shipped_targets()}
    chosen = host_target(host).name if not all(lacking.values()) else None
    if as_json:
        document = {
            "machine": host.machine,
            "processor": processor_name(),
            "instruction_sets": instruction_sets(),
            "gpus": [asdict(gpu) for gpu in host.gpus],
            "providers": host.providers,
            "host": chosen,
            "lacking": lacking,
        }
        emit(json.dumps(document, indent=2, ensure_ascii=False))
        return
    terminal = Terminal()
    gpus = [f"{gpu.name} (compute capability {gpu.compute_capability})" for gpu in host.gpus]
    terminal.facts(
        f"This host is {chosen or 'none of the shipped targets'}",
        {
            "processor": f"{processor_name()} ({host.machine})",
            "instruction sets": _shown(instruction_sets()),
            "NVIDIA GPUs": _shown(gpus) or "none",
            "providers": _shown(host.providers),
        },
    )
    table = _table("target", "", "what this host lacks for it")
    for name, reasons in lacking.items():
        fits = Text("no", "yellow") if reasons else Text("yes", "green")
        table.add_row(name, fits, Text(" ".join(reasons)))
    terminal.console.print(table)


@targets.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
@trust_options
@json_option
def check(bundle: Path, trust: Trust, as_json: bool) -> int:
    """Check whether BUNDLE can run on this host, and why not. Nothing is run; exit code 0 if it can, 1 if it cannot."""
    from glmexport.bundle.fit import fit
    from glmexport.foundation.errors import EXIT_BLOCK, EXIT_PASS
    from glmexport.foundation.host import Host
    from glmexport.release.opening import open_signed

    opened = open_signed(bundle, trust, Terminal())
    checks = fit(opened, Host.this())
    runs = all(each.holds for each in checks)
    if as_json:
        document = {"target": opened.target.name, "runs": runs, "checks": [asdict(each) for each in checks]}
        emit(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        table = _table("condition", "", "")
        for each in checks:
            table.add_row(each.name, Text("yes", "green") if each.holds else Text("no", "red"), Text(each.detail))
        console = Terminal().console
        console.print(table)
        console.print(f"{bundle} was built for {opened.target.name} and {'can' if runs else 'cannot'} run here.")
    return EXIT_PASS if runs else EXIT_BLOCK


def _plain(lowering: Lowering) -> dict[str, object]:
    claim = lowering.claim
    return {
        "name": lowering.name,
        "does": lowering.does,
        "key": lowering.key,
        "why": claim.why if claim else None,
        "how": claim.how if claim else None,
    }


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column)
    return table


def _shown(value: object) -> str:
    if isinstance(value, tuple | list | frozenset):
        return ", ".join(str(item) for item in value)
    return str(value)
