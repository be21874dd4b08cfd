"""``glmexport deploy``, ``rollback``, ``status``, ``prune`` and ``units``: releases on the servers of a site."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from glmexport.cli.console import Terminal, emit, say
from glmexport.cli.options import json_option
from glmexport.foundation.errors import EXIT_BLOCK, EXIT_MACHINE, EXIT_PASS
from glmexport.report.text import brief_size

if TYPE_CHECKING:
    from glmexport.deployment.rollout import Outcome

_SITE = click.argument("site", type=click.Path(path_type=Path))
_COLOURS = {"confirmed": "green", "unchanged": "green", "done": "green", "not begun": "dim"}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@_SITE
@click.option("--unproven", is_flag=True, help="Also if its report's verdict is neither PASS nor WARN.")
@click.option("--allow-older", is_flag=True, help="Also if a release with a higher counter was served there.")
@click.option(
    "--replace-key", is_flag=True, help="Have the servers trust the site's key from now on, and not the one before."
)
@json_option
def deploy(bundle: Path, site: Path, unproven: bool, allow_older: bool, replace_key: bool, as_json: bool) -> int:
    """Serve the signed BUNDLE on every server of SITE.

    Missing files are sent, the release is verified there, asked on another port where the site names one, switched to,
    and asked again; a server that does not answer as it should gets its former release back. Exit code 0 if all serve
    it, 1 if the release was refused or taken back, 69 if a server could not be reached or has no room.
    """
    from glmexport.deployment.rollout import DeployOptions, deploy, trust_file
    from glmexport.deployment.signed import SignedBundle
    from glmexport.deployment.site import open_site

    terminal = Terminal()
    place = open_site(site)
    release = SignedBundle.open(bundle, trust_file(place), terminal, place.subject)
    terminal.facts(
        "Release",
        {
            "bundle": f"{bundle} ({release.target})",
            "name": release.name,
            "counter": str(release.counter),
            "size": f"{brief_size(release.bytes)} in {len(release.files)} files",
            "verdict": release.verdict.value if release.verdict else "no report",
            "servers": ", ".join(place.servers),
        },
    )
    if not unproven:
        release.require_proof()
    outcomes = deploy(place, release, terminal, DeployOptions(allow_older, replace_key))
    return _told(terminal, outcomes, as_json)


@click.command()
@_SITE
@click.option("--to", "name", metavar="RELEASE", help="Another than the one before.")
@json_option
def rollback(site: Path, name: str | None, as_json: bool) -> int:
    """Serve a former release on every server of SITE, verified once more."""
    from glmexport.deployment.rollout import roll_back
    from glmexport.deployment.site import open_site

    terminal = Terminal()
    return _told(terminal, roll_back(open_site(site), name, terminal), as_json)


@click.command()
@_SITE
@json_option
def status(site: Path, as_json: bool) -> int:
    """Show what every server of SITE serves, what else it has, and how it came to that."""
    from glmexport.deployment.rollout import status as ask
    from glmexport.deployment.site import open_site

    terminal = Terminal()
    outcomes = ask(open_site(site), terminal)
    code = _told(terminal, outcomes, as_json)
    for outcome in outcomes:
        if not as_json and outcome.facts:
            _history(terminal, outcome)
    return code


@click.command()
@_SITE
@click.option("--keep", type=click.IntRange(min=1), default=3, show_default=True, help="Releases that served last.")
@json_option
def prune(site: Path, keep: int, as_json: bool) -> int:
    """Remove old releases from every server of SITE; never the present one, nor the one before it."""
    from glmexport.deployment.rollout import prune as remove
    from glmexport.deployment.site import open_site

    terminal = Terminal()
    outcomes = remove(open_site(site), keep, terminal)
    for outcome in outcomes:
        for name in outcome.facts.get("pruned", ()):
            terminal.remark(f"{outcome.server}: {name} removed.")
    return _told(terminal, outcomes, as_json)


@click.command()
@_SITE
@click.option("--server", "name", metavar="NAME", help="Of several, which.")
@json_option
def units(site: Path, name: str | None, as_json: bool) -> None:
    """Print the systemd units that serve what is deployed to a server of SITE."""
    from glmexport.deployment.site import open_site
    from glmexport.deployment.unit import service_unit, socket_unit

    servers = open_site(site).servers
    if name is None and len(servers) > 1:
        raise click.UsageError(f"The site has several servers; give --server {' or '.join(servers)}.")
    if name is not None and name not in servers:
        raise click.UsageError(f"The site has no server {name!r}; it has {', '.join(servers)}.")
    server = servers[name or next(iter(servers))]
    texts = {"glmexport.socket": socket_unit(server), "glmexport.service": service_unit(server)}
    if as_json:
        emit(json.dumps(texts, indent=2))
        return
    emit("\n".join(f"# /etc/systemd/system/{path}\n{text}" for path, text in texts.items()))
    Terminal().remark(
        "Put both in their places, then: systemctl daemon-reload && systemctl enable --now glmexport.socket"
    )


def _told(terminal: Terminal, outcomes: Sequence[Outcome], as_json: bool) -> int:
    """Show what became of every server; the exit code."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("server", "", "release", "sent"):
        table.add_column(column)
    for outcome in outcomes:
        state = Text(outcome.state, _COLOURS.get(outcome.state, "red"))
        sent = brief_size(outcome.sent_bytes) if outcome.sent_bytes else ""
        table.add_row(outcome.server, state, outcome.release or "none", sent)
    terminal.console.print(table)
    for outcome in outcomes:
        if outcome.why:
            say("ERROR", outcome.why, outcome.next_step or "")
    if as_json:
        emit(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    if all(outcome.served for outcome in outcomes):
        return EXIT_PASS
    return EXIT_BLOCK if any(outcome.judged for outcome in outcomes) else EXIT_MACHINE


def _history(terminal: Terminal, outcome: Outcome) -> None:
    facts = outcome.facts
    if facts["unconfirmed"]:
        terminal.remark(
            f"{outcome.server}: the switch to {facts['unconfirmed']} was killed before it was confirmed; the next "
            "deployment or rollback takes it back first."
        )
    table = Table(title=f"{outcome.server}: {len(facts['releases'])} releases", title_justify="left", box=None)
    for column in ("time", "event", "release", "counter", "why"):
        table.add_column(column, overflow="fold")
    for entry in facts["ledger"]:
        values = (entry["time"], entry["event"], entry.get("release"), entry.get("counter"), entry.get("why"))
        table.add_row(*(Text("" if value is None else str(value)) for value in values))
    terminal.console.print(table)
