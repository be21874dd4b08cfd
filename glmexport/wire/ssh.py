"""Connections by SSH, only with the host key that known_hosts has for the machine; no key is ever added."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from glmexport.foundation.errors import InputError, MachineError
from glmexport.foundation.progress import Progress

if TYPE_CHECKING:
    import asyncssh

SCHEME = "ssh://"
#: Seconds for connecting and for logging in, and seconds between signs of life, of which four may be missed.
_CONNECT_S, _ALIVE_S = 30, 15
#: Seconds to wait after a lost connection; each further time twice as long, up to half a minute.
_WAIT_S = 1.0


@dataclass(frozen=True)
class SshAddress:
    """The address ``ssh://user@host:port`` of a machine, with the keys for it.

    ``key`` is a private key's file; without one, the agent's and the user's usual ones are tried.
    """

    #: The name for messages.
    name: str
    host: str
    user: str | None = None
    port: int | None = None
    key: Path | None = None
    known_hosts: Path = Path("~/.ssh/known_hosts")


def parse_address(address: str, name: str | None = None, **options: Any) -> SshAddress:
    """Return the machine of ``ssh://user@host:port``; ``options`` are its key and known_hosts.

    Raises:
        InputError: it is no such address.
    """
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme != "ssh" or not parts.hostname or parts.path.strip("/") or parts.query or parts.password:
        raise InputError(
            f"{address!r} is no device behind SSH.",
            next_step="Write ssh://user@host or ssh://user@host:port; a key is named in a file.",
        )
    return SshAddress(name=name or address, host=parts.hostname, user=parts.username, port=port, **options)


def require_asyncssh(extra: str) -> None:
    """Require that asyncssh is installed.

    Raises:
        MachineError: it is not; the message names the ``extra`` that has it.
    """
    try:
        import asyncssh  # noqa: F401
    except ImportError as error:
        raise MachineError(
            "What is behind SSH needs the package asyncssh.", next_step=f"pip install 'glmexport[{extra}]'"
        ) from error


@asynccontextmanager
async def connected(address: SshAddress, *, first: bool = True) -> AsyncIterator[asyncssh.SSHClientConnection]:
    """Open a connection; one that is not the ``first`` ends like a lost one if the machine cannot be reached.

    Raises:
        InputError: there is no file of known hosts.
        MachineError: the host key is not in it, the user is not let in, or the machine cannot be reached.
        asyncssh.ConnectionLost: the machine cannot be reached any more.
    """
    import asyncssh

    known = address.known_hosts.expanduser()
    if not known.is_file():
        raise InputError(
            f"{address.name}: there is no file of known hosts {known}.",
            next_step="Ask the machine's administrator for its host key and write it there; "
            "ssh-keyscan prints a line to compare.",
        )
    options: dict[str, Any] = {"port": address.port} if address.port else {}
    if address.user:
        options["username"] = address.user
    if address.key:
        options["client_keys"] = [str(address.key.expanduser())]
    try:
        connection = await asyncssh.connect(
            address.host,
            known_hosts=str(known),
            connect_timeout=_CONNECT_S,
            login_timeout=_CONNECT_S,
            keepalive_interval=_ALIVE_S,
            keepalive_count_max=4,
            **options,
        )
    except asyncssh.HostKeyNotVerifiable as error:
        raise MachineError(
            f"{address.name}: the host key of {address.host} is refused: {known} does not have it for this host.",
            next_step="Ask the machine's administrator which key is right. A changed key can be another machine.",
        ) from error
    except asyncssh.PermissionDenied as error:
        raise MachineError(
            f"{address.name}: {address.host} does not let this user in: {error.reason}.",
            next_step="Name the user and the private key that are meant for this machine.",
        ) from error
    except (OSError, asyncssh.Error, asyncssh.KeyImportError) as error:
        reason = str(error) or type(error).__name__
        if first or isinstance(error, asyncssh.KeyImportError):
            raise MachineError(
                f"{address.name}: {address.host} cannot be reached: {reason}.",
                next_step="Correct the address or the key, or see that the machine is up.",
            ) from error
        raise asyncssh.ConnectionLost(reason) from error
    async with connection:
        yield connection


async def persist(
    address: SshAddress,
    reconnects: int,
    progress: Progress,
    visit: Callable[[asyncssh.SSHClientConnection], Awaitable[None]],
) -> None:
    """Connect for a ``visit``, and again for another one if the connection is lost, up to ``reconnects`` times.

    Raises:
        InputError, MachineError: as ``connected``; or the connection was lost once too often.
    """
    import asyncssh

    lost = 0
    while True:
        try:
            async with connected(address, first=lost == 0) as connection:
                await visit(connection)
            return
        except (asyncssh.DisconnectError, asyncssh.ChannelOpenError, ConnectionError) as error:
            lost += 1
            if lost > reconnects:
                raise MachineError(
                    f"{address.name}: the connection was lost {lost} times; last: {error}.",
                    next_step="Look at the network and the machine, then run the same command again: it goes on.",
                ) from error
            progress.remark(f"{address.name}: connection lost ({error}); going on, {lost} of {reconnects} times.")
            await asyncio.sleep(min(30, _WAIT_S * 2 ** (lost - 1)))
