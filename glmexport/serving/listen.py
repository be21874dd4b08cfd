"""The socket: one of our own, or one that systemd holds, so that a restart loses no connection.

On SIGTERM the server stops accepting at once. What it accepted is answered; what was not waits in the kernel's backlog
of an inherited socket for the next process.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from glmexport.errors import InputError, MachineError
from glmexport.serving.guard import is_loopback
from glmexport.serving.limits import Limits

#: The first file descriptor that systemd hands over.
_FIRST_FD = 3
_BACKLOG = 512
#: How long a connection may bring its first request after the server stopped accepting, and how long another one.
_LATE_S, _LATE_AGAIN_S = 2.0, 0.25


def inherited_socket(environment: Mapping[str, str]) -> socket.socket | None:
    """The listening socket that systemd, or another that follows its protocol, has handed over; None: none.

    Raises:
        InputError: more than one, or one that does not listen for streams.
    """
    if environment.get("LISTEN_PID") != str(os.getpid()) or environment.get("LISTEN_FDS", "0") == "0":
        return None
    next_step = "Hand over one listening stream socket as file descriptor 3."
    if environment["LISTEN_FDS"] != "1":
        raise InputError(f"LISTEN_FDS is {environment['LISTEN_FDS']}; one socket is served.", next_step=next_step)
    try:
        held = socket.socket(fileno=_FIRST_FD)
        listens = held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and held.type == socket.SOCK_STREAM
    except OSError as error:
        raise InputError(f"File descriptor 3 is no socket: {error.strerror}.", next_step=next_step) from error
    if not listens:
        raise InputError("File descriptor 3 is no listening stream socket.", next_step=next_step)
    os.set_inheritable(_FIRST_FD, False)
    return held


def own_socket(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host`` and ``port``; port 0 is any free one.

    Raises:
        InputError: there is no such address.
        MachineError: the address is taken, or not ours to take.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise InputError(f"{host} is no address: {error.strerror}.", next_step="Give another --host.") from error
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise MachineError(
            f"{host}, port {port} cannot be listened on: {error.strerror}.", next_step="Give another --host or --port."
        ) from error
    return made


def reached_from_outside(listener: socket.socket) -> bool:
    """Whether other machines can connect."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return not is_loopback(listener.getsockname()[0])


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine reaches it."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def notify(state: str) -> None:
    """Tell systemd, if it wants to know."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        # Nothing here waits for one who does not listen.
        told.setblocking(False)
        try:
            told.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            # It is told for its own sake: what it does not hear, it finds out.
            return


def watchdog_s() -> float | None:
    """How often systemd wants to hear that the server lives: twice in the time that it waits; None: never."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(microseconds) / 2e6 if ours and microseconds.isdigit() and int(microseconds) else None


class Server(uvicorn.Server):
    """``application`` on a ``listener``, which another process goes on with if it was ``inherited``.

    ``draining`` is called when it stops accepting, and ``give_up`` when what still runs ``drain_s`` later has to end.
    """

    def __init__(
        self,
        application: ASGIApp,
        listener: socket.socket,
        *,
        inherited: bool,
        limits: Limits,
        drain_s: float,
        draining: Callable[[], None],
        give_up: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            application,
            http=self._connection_type(limits),
            ws="none",
            lifespan="off",
            interface="asgi3",
            loop="asyncio",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=int(limits.idle_s),
            # What was given up has this long to be told.
            timeout_graceful_shutdown=math.ceil(drain_s + _LATE_S),
        )
        super().__init__(config)
        # It may be told to stop before asyncio has made it so.
        listener.setblocking(False)
        self._listener = listener
        self._inherited = inherited
        self._signalled = False
        self._late: set[asyncio.Task[Any]] = set()
        self._drain_s = drain_s
        self._draining = draining
        self._give_up = give_up

    async def listen(self) -> None:
        """Until a signal ends it, and what was accepted is answered."""
        await self.serve([self._listener])

    def stop(self) -> None:
        """Stop accepting now; end once what was accepted is answered."""
        if self.should_exit:
            return
        self.should_exit = True
        if not self._inherited:
            self._accept_the_rest()
        for server in getattr(self, "servers", ()):
            server.close()
        self._draining()
        asyncio.get_running_loop().call_later(self._drain_s, self._give_up)

    def _accept_the_rest(self) -> None:
        """Take what the kernel has accepted already: behind a socket that is closed, nobody else would."""
        loop = asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state={}
            )
            return made

        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            task = loop.create_task(loop.connect_accepted_socket(connection, accepted))
            self._late.add(task)
            task.add_done_callback(self._late.discard)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """SIGTERM and SIGINT end it in order, and not by the signal; a second SIGINT at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
                if self._signalled:
                    # What is on its way out is not to be cut short.
                    signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int) -> None:
        if self.should_exit and number == signal.SIGINT:
            self._give_up()
            self.force_exit = True
        self._signalled = True
        self.stop()

    def _connection_type(self, limits: Limits) -> type[H11Protocol]:
        """A connection as uvicorn has it, which is also closed when the head of a request does not come.

        One that was accepted before the server stopped accepting may still bring a request for a while.
        """
        server = self

        class Connection(H11Protocol):
            _head: asyncio.TimerHandle | None = None

            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                self._head = self.loop.call_later(limits.head_s, self._close)
                if server.should_exit:
                    self.shutdown()

            def data_received(self, data: bytes) -> None:
                super().data_received(data)
                if self.conn.their_state is not h11.IDLE:
                    self._arrived()
                elif self._head is None:
                    self._head = self.loop.call_later(limits.head_s, self._close)
                if server.should_exit and self.cycle is not None:
                    self.cycle.keep_alive = False

            def connection_lost(self, exc: Exception | None) -> None:
                self._arrived()
                super().connection_lost(exc)

            def shutdown(self) -> None:
                if self.cycle is None or self.cycle.response_complete:
                    self.loop.call_later(_LATE_S if self.cycle is None else _LATE_AGAIN_S, self._close_idle)
                else:
                    self.cycle.keep_alive = False

            def _arrived(self) -> None:
                if self._head is not None:
                    self._head.cancel()
                    self._head = None

            def _close_idle(self) -> None:
                if self.cycle is None or self.cycle.response_complete:
                    self._close()

            def _close(self) -> None:
                if not self.transport.is_closing():
                    self.transport.close()

        return Connection
