"""The socket: one of our own, or one that systemd holds, so that a restart loses no connection.

On SIGTERM the server stops accepting at once. What it accepted is answered; what was not waits in the kernel's backlog
of an inherited socket for the next process.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from glmexport.foundation.errors import InputError, MachineError
from glmexport.serving.connection import LATE_S, Connection
from glmexport.serving.guard import is_loopback
from glmexport.serving.limits import ServingLimits
from glmexport.serving.log import on_loop_failure

#: The first file descriptor that systemd hands over.
_FIRST_FD = 3
_BACKLOG = 512
#: Connections that are accepted in one round of the loop, and the seconds without accepting where the system has no
#: more to give.
_AT_ONCE, _PAUSE_S = 16, 0.5
#: Files that are left to everything else, and the fewest connections that are worth a server.
_FILES, _FEWEST = 64, 16
#: Seconds by which what came with a connection has been read.
_CHANCE_S = 0.01
_CROWDED = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


def inherited_socket(environment: Mapping[str, str]) -> socket.socket | None:
    """Return the listening socket that systemd, or another that follows its protocol, has handed over; None: none.

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
    """Return a socket that listens on ``host`` and ``port``; port 0 is any free one.

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
    """Return whether other machines can connect."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return not is_loopback(listener.getsockname()[0])


def url_of(listener: socket.socket) -> str:
    """Return the URL at which a client on this machine reaches the server."""
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
    """Return the seconds after which systemd wants a sign of life: half of the time that it waits; None: never."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(microseconds) / 2e6 if ours and microseconds.isdigit() and int(microseconds) else None


def most_connections(limits: ServingLimits) -> int:
    """Return how many connections there can be at a time, so that files are left for everything else.

    Raises:
        MachineError: the process may open too few files.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return limits.connections
    if files < _FILES + _FEWEST:
        raise MachineError(
            f"This process may open {files} files, and a server needs {_FILES + _FEWEST}.",
            next_step="Raise the limit: ulimit -n 4096, or LimitNOFILE= for systemd.",
        )
    return min(limits.connections, files - _FILES)


class HttpServer(uvicorn.Server):
    """A server of ``application`` on a ``listener``, which another process goes on with if it was ``inherited``.

    ``draining`` is called when it stops accepting, and ``give_up`` when what still runs ``drain_s`` later has to end.
    """

    def __init__(
        self,
        application: ASGIApp,
        listener: socket.socket,
        *,
        inherited: bool,
        limits: ServingLimits,
        drain_s: float,
        draining: Callable[[], None],
        give_up: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            application,
            http=Connection,
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
        )
        super().__init__(config)
        # It may be told to stop before asyncio has made it so.
        listener.setblocking(False)
        self._listener = listener
        self._inherited = inherited
        self._limits = limits
        self._most = most_connections(limits)
        self._open: set[Connection] = set()
        self._signalled = False
        self._accepted: set[asyncio.Task[Any]] = set()
        self._drain_s = drain_s
        self._draining = draining
        self._give_up = give_up

    async def listen(self) -> None:
        """Serve until a signal ends it, and what was accepted is answered."""
        asyncio.get_running_loop().set_exception_handler(on_loop_failure)
        await self.serve([self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept, in place of asyncio's server, which takes connections until no file is left."""
        self.servers = []
        self.started = True
        if not self.should_exit:
            self._resume()

    def stop(self) -> None:
        """Stop accepting now; end once what was accepted is answered, or ``drain_s`` and a little later."""
        if self.should_exit:
            return
        self.should_exit = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        if not self._inherited:
            # Behind a socket that is closed, nobody else would take what the kernel has accepted already.
            self._accept(_BACKLOG)
        self._listener.close()
        self._draining()
        loop.call_later(self._drain_s, self._give_up)
        loop.call_later(self._drain_s + LATE_S / 2, self._end)
        self._leave_the_silent({})

    def _resume(self) -> None:
        """Accept from now on."""
        if not self.should_exit:
            asyncio.get_running_loop().add_reader(self._listener, self._accept, _AT_ONCE)

    def _accept(self, most: int) -> None:
        """Take connections that wait, at most so many."""
        loop = asyncio.get_running_loop()
        for _ in range(most):
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                # No file or memory is left; the loop would ask again at once, and for ever.
                loop.remove_reader(self._listener)
                loop.call_later(_PAUSE_S, self._resume)
                return
            if len(self._open) < self._most or self._make_room():
                self._take(accepted)
            else:
                with accepted, suppress(OSError):
                    accepted.setblocking(False)
                    accepted.send(_CROWDED)

    def _take(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection = Connection(
            self.config, self.server_state, self._limits, lambda: self.should_exit, self._open.discard
        )
        self._open.add(connection)

        def taken(task: asyncio.Task[Any]) -> None:
            self._accepted.discard(task)
            if task.cancelled() or task.exception():
                self._open.discard(connection)

        task = loop.create_task(loop.connect_accepted_socket(lambda: connection, accepted))
        self._accepted.add(task)
        task.add_done_callback(taken)

    def _make_room(self) -> bool:
        """End the connection whose client has been waited for longest; False where it is the server's turn with all."""
        waiting = [(since, id(open_), open_) for open_ in self._open if (since := open_.awaited_since) is not None]
        if not waiting:
            return False
        since, _, oldest = min(waiting)
        if asyncio.get_running_loop().time() - since < _CHANCE_S:
            return False
        self._open.discard(oldest)
        oldest.leave()
        return True

    def _leave_the_silent(self, before: Mapping[Connection, tuple[int, int]]) -> None:
        """While the server ends: end connections whose clients have neither brought nor taken anything for a while."""
        awaited = {open_: open_.progress for open_ in self._open if open_.awaited_since is not None}
        for connection, progress in awaited.items():
            if before.get(connection) == progress:
                connection.leave()
        asyncio.get_running_loop().call_later(LATE_S, self._leave_the_silent, awaited)

    def _end(self) -> None:
        """Wait for nobody any more."""
        for connection in list(self._open):
            connection.leave()
        for task in self.server_state.tasks:
            task.cancel()
        self.force_exit = True

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Let SIGTERM and SIGINT end the server in order, and not kill it; a second SIGINT ends it at once."""
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
