"""A release on all servers of a site: sent to all side by side, and switched to by few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmexport.deployment.events import ServerStatus, check_event
from glmexport.deployment.remote import Remote, order_name, require_fit
from glmexport.deployment.signed import SignedBundle
from glmexport.deployment.site import Site
from glmexport.foundation.errors import GlmexportError, InputError
from glmexport.foundation.progress import Progress
from glmexport.wire.runner import ProgramError
from glmexport.wire.server.layout import NAME
from glmexport.wire.ssh import persist, require_asyncssh

if TYPE_CHECKING:
    import asyncssh

#: Kinds of errors by which the program of a server says that it does not serve a release for what it is.
_JUDGED = ("refused", "rolled back", "signature", "trust")


@dataclass
class Outcome:
    """The outcome of a deployment on one server."""

    server: str
    #: One of ``confirmed``, ``unchanged``, ``rolled back``, ``refused``, ``failed`` and ``not begun``.
    state: str = "not begun"
    release: str | None = None
    why: str | None = None
    next_step: str | None = None
    sent_bytes: int = 0
    #: Last hash of the server's ledger.
    head: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def served(self) -> bool:
        """Whether it serves what it was asked to."""
        return self.state in ("confirmed", "unchanged", "done")

    @property
    def judged(self) -> bool:
        """Whether the release, not the way to the server, was found wanting."""
        return self.state in _JUDGED

    def fail(self, error: GlmexportError) -> None:
        """Note what went wrong."""
        kind = error.kind if isinstance(error, ProgramError) else "failed"
        self.state = kind if kind in _JUDGED else "failed"
        self.why, self.next_step = error.message, error.next_step


@dataclass(frozen=True)
class DeployOptions:
    """The options of a deployment beside the release."""

    allow_older: bool = False
    replace_trust: bool = False


def deploy(site: Site, release: SignedBundle, progress: Progress, wishes: DeployOptions | None = None) -> list[Outcome]:
    """Serve ``release`` on every server of ``site``.

    All are looked at before anything is sent, and all have the release before any switches. After the first that does
    not serve it, no further one is begun with.
    """
    wishes = wishes or DeployOptions()
    outcomes = {name: Outcome(name, release=release.name) for name in site.servers}
    orders = {name: order_name() for name in site.servers}

    async def prepared(remote: Remote, outcome: Outcome) -> None:
        await remote.order(
            release, orders[remote.name], allow_older=wishes.allow_older, replace_trust=wishes.replace_trust
        )
        outcome.facts = await remote.result("preflight", "facts", orders[remote.name])
        require_fit(remote.name, release, outcome.facts)

    async def sent(remote: Remote, outcome: Outcome) -> None:
        async with remote.turn():
            outcome.sent_bytes += await remote.send(release, orders[remote.name])
            await remote.result("assemble", "done", orders[remote.name])

    async def switched(remote: Remote, outcome: Outcome) -> None:
        await _follow(remote, outcome, "activate", orders[remote.name])

    async def everything() -> None:
        everywhere = len(outcomes)
        for step, at_a_time in ((prepared, everywhere), (sent, everywhere), (switched, site.max_unavailable)):
            if all(outcome.why is None for outcome in outcomes.values()):
                await _side_by_side(site, list(outcomes.values()), step, at_a_time, progress)

    _run(everything)
    return list(outcomes.values())


def roll_back(site: Site, name: str | None, progress: Progress) -> list[Outcome]:
    """Serve the release ``name``, or the one before, on every server that has it.

    Raises:
        InputError: ``name`` is that of no release.
    """
    if name is not None and not NAME.fullmatch(name):
        raise InputError(f"{name!r} is no name of a release.", next_step="Give one that glmexport status lists.")
    orders = {server: order_name() for server in site.servers}

    async def switched(remote: Remote, outcome: Outcome) -> None:
        await remote.order(None, orders[remote.name])
        await _follow(remote, outcome, "rollback", orders[remote.name], *([name] if name else []))

    return _all(site, switched, site.max_unavailable, progress)


def status(site: Site, progress: Progress) -> list[Outcome]:
    """Return what every server serves, and what it could serve."""

    async def asked(remote: Remote, outcome: Outcome) -> None:
        await remote.install()
        outcome.facts = await remote.result("status", "status")
        found = check_event(ServerStatus, outcome.facts, remote.name)
        outcome.release, outcome.head = found.current, found.head
        outcome.state = "done"

    return _all(site, asked, len(site.servers), progress)


def prune(site: Site, keep: int, progress: Progress) -> list[Outcome]:
    """Remove releases but the present one, the one before it, and the ``keep`` that served last."""

    async def pruned(remote: Remote, outcome: Outcome) -> None:
        await remote.install()
        told = [event async for event in remote.run("prune", str(keep)) if event.get("event") == "pruned"]
        removed = [str(event.get("release")) for event in told]
        outcome.facts, outcome.state = {"pruned": removed}, "done"

    return _all(site, pruned, len(site.servers), progress)


_Step = Callable[[Remote, Outcome], Awaitable[None]]


def _all(site: Site, step: _Step, at_a_time: int, progress: Progress) -> list[Outcome]:
    outcomes = [Outcome(name) for name in site.servers]

    async def everything() -> None:
        await _side_by_side(site, outcomes, step, at_a_time, progress)

    _run(everything)
    return outcomes


def _run(everything: Callable[[], Awaitable[None]]) -> None:
    require_asyncssh("deploy")

    async def run() -> None:
        await everything()

    asyncio.run(run())


async def _side_by_side(site: Site, outcomes: list[Outcome], step: _Step, at_a_time: int, progress: Progress) -> None:
    """Do ``step`` on every server, ``at_a_time`` of them; where one fails, none is begun with any more."""
    room = asyncio.Semaphore(at_a_time)

    async def one(outcome: Outcome) -> None:
        async with room:
            if any(other.why for other in outcomes):
                return

            async def visit(connection: asyncssh.SSHClientConnection) -> None:
                await step(Remote(site, outcome.server, connection, progress), outcome)

            server = site.servers[outcome.server]
            try:
                await persist(site.address(outcome.server), server.reconnects, progress, visit)
            except GlmexportError as error:
                outcome.fail(error)

    await asyncio.gather(*(one(outcome) for outcome in outcomes))


async def _follow(remote: Remote, outcome: Outcome, command: str, *arguments: str) -> None:
    async for told in remote.run(command, *arguments):
        if told.get("event") in ("confirmed", "unchanged"):
            outcome.state, outcome.release = told["event"], str(told.get("release"))
            outcome.head = str(told["head"]) if "head" in told else None


def trust_file(site: Site) -> Path:
    """Return the file of the key that releases are signed with.

    Raises:
        InputError: there is none.
    """
    site.trusted()
    return site.folder / site.trust.expanduser()
