"""The guard of a server: it checks the host that is named, the origin that a browser tells, and the key.

A page that a browser on this machine shows can send requests to loopback; by DNS rebinding even under a name that it
takes for its own. So the name in the Host header has to be one of ours, on every method, and an origin that of the
host.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmexport.serving.failure import FAILED, ClientGone, Refused
from glmexport.serving.log import described

if TYPE_CHECKING:
    from glmexport.serving.metrics import Metrics

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
#: Paths that are answered without a key, so that whoever starts the server can see whether it is there.
_OPEN = frozenset({"/healthz", "/readyz"})

#: Keys of a request's state: its name, and the number of its key.
REQUEST, KEY = "request_id", "key"

_log = logging.getLogger("glmexport.serving")


@dataclass(frozen=True)
class AccessRules:
    """The rules of access. ``keys``: any of them opens, none: all are let in. ``hosts``: names beside loopback's."""

    keys: tuple[bytes, ...] = ()
    hosts: frozenset[str] = frozenset()


class Guard:
    """A guard before an application, by the rules of ``access``; an error becomes a response, never a traceback."""

    def __init__(self, application: ASGIApp, access: AccessRules, metrics: Metrics) -> None:
        self._application = application
        self._access = access
        self._metrics = metrics
        #: Whether connections end with the response that they carry.
        self.closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, by the interface of ASGI."""
        if scope["type"] != "http":
            return
        begun = False
        # By it, what a client saw and what the log has can be put together.
        name = f"req_{secrets.token_hex(12)}"
        scope["state"] = {**scope.get("state", {}), REQUEST: name}

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    self._metrics.refused.labels(str(message["status"])).inc()
                closing = [(b"connection", b"close")] if self.closing else []
                headers = [*message["headers"], (b"x-request-id", name.encode()), *closing]
                message = {**message, "headers": headers}
            await send(message)

        try:
            scope["state"][KEY] = self._checked(scope)
            await self._application(scope, receive, noting)
        except Refused as refused:
            if not begun:
                await refused.response(scope, receive, noting)
        except (ClientGone, asyncio.CancelledError):
            # The server cancels at its very end, when it has left the connection.
            pass
        except Exception as error:
            _log.error("Request %s failed: %s.", name, described(error))
            if not begun:
                await FAILED.response(scope, receive, noting)

    def _checked(self, scope: Scope) -> int | None:
        """The number of the key that the request has, None without one; raise Refused unless it may be answered."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        hosts, origins = headers.get(b"host", []), headers.get(b"origin", [])
        host = hosts[0].decode("latin-1").lower() if len(hosts) == 1 else ""
        if not self._is_ours(host, scope.get("server")):
            raise Refused(403, "The Host header names no host of this server (--allow-host).", code="host_refused")
        if origins and (len(origins) > 1 or origins[0].decode("latin-1").lower() not in _own_origins(host)):
            raise Refused(403, "Pages of other origins are not answered.", code="origin_refused")
        if not self._access.keys or scope["path"] in _OPEN:
            return None
        key = self._key(headers.get(b"authorization", []))
        if key is None:
            raise Refused(
                401, "The key is missing or wrong.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
        return key

    def _is_ours(self, host: str, server: Iterable[object] | None) -> bool:
        name = _name(host)
        if name is None:
            return False
        # An address cannot be rebound: it is the one that the client came to, or it is not.
        return name in _LOOPBACK | self._access.hosts or (server is not None and name == next(iter(server), None))

    def _key(self, given: list[bytes]) -> int | None:
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # Every key is compared, so that time tells nothing about which one was near.
        right = [hmac.compare_digest(key.strip(), mine) for mine in self._access.keys]
        return right.index(True) if scheme.lower() == b"bearer" and any(right) else None


def _own_origins(host: str) -> tuple[str, str]:
    return f"http://{host}", f"https://{host}"


def _name(host: str) -> str | None:
    """The name or address in a Host header; None if it is none."""
    if host.startswith("["):
        name, closed, port = host[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            return None
        port = port.removeprefix(":")
    else:
        name, _, port = host.partition(":")
    return name if name and (not port or (port.isascii() and port.isdigit())) else None


def is_loopback(address: str) -> bool:
    """Return whether nobody but this machine reaches an address or name."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
