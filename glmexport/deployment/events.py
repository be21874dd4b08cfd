"""Events that the program of a server sends, checked for their form: they come from another machine."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from glmexport.foundation.errors import MachineError


class ServerEvent(BaseModel):
    """An event that the program of a server sends."""

    # What later versions of the program add is not looked at.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class ServerHost(ServerEvent):
    """The kind of machine that a server is, and what it lacks for each target."""

    host: str | None
    lacking: dict[str, list[str]]


class ServerFacts(ServerEvent):
    """The facts that decide whether a release can come to a server."""

    free_bytes: int
    free_inodes: int | None
    received_bytes: int
    openssl: str | None
    host: ServerHost | None
    host_unknown_because: str | None


class LedgerEntry(ServerEvent):
    """A line of the ledger."""

    time: str
    event: str


class ServerStatus(ServerEvent):
    """The releases that a server has and serves."""

    current: str | None
    releases: list[str]
    unconfirmed: str | None
    head: str
    ledger: list[LedgerEntry]


Kind = TypeVar("Kind", bound=ServerEvent)


def check_event(kind: type[Kind], event: dict[str, Any], who: str) -> Kind:
    """Return ``event`` as the kind that it has to be.

    Raises:
        MachineError: it is something else; names the server.
    """
    try:
        return kind.model_validate(event)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise MachineError(
            f"{who} tells something that cannot be: {'.'.join(map(str, first['loc']))}: {first['msg']}.",
            next_step="Look at the server: another program than the one that was sent answers there.",
        ) from error
