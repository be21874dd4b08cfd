"""The server from which a browser reads a job and to which it posts answers, on the loopback address only.

Every path begins with a token of the run, which only the browser that was started knows. Only a list of names can be
read, each of which stands for one file: no path is put together from a request.
"""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

LOOPBACK = "127.0.0.1"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".json": "application/json",
    ".wasm": "application/wasm",
}
_HEADERS = {
    # A page needs both for shared memory, and so for threads.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

#: The resource under each name: a file, or bytes.
Resources = Mapping[str, Path | bytes]
#: Most bytes that are accepted under each name.
Accepted = Mapping[str, int]
#: A function from the name and the bytes of a post to the answer; its ValueError tells the browser what is wrong.
Receive = Callable[[str, bytes], bytes]


class PageServer(ThreadingHTTPServer):
    """A server that serves ``resources`` and hands on what is posted to the ``accepted`` names."""

    daemon_threads = True

    def __init__(self, resources: Resources, accepted: Accepted, receive: Receive) -> None:
        super().__init__((LOOPBACK, 0), _Request)
        self.token = secrets.token_urlsafe(32)
        self.resources, self.accepted, self.receive = resources, accepted, receive

    @property
    def url(self) -> str:
        """The URL that every name is appended to."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.token}/"


@contextmanager
def serving(resources: Resources, accepted: Accepted, receive: Receive) -> Iterator[PageServer]:
    """Run a server in a thread of its own, as long as the context lasts."""
    with PageServer(resources, accepted, receive) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Request(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    #: Seconds of silence after which a connection is closed.
    timeout = 600

    def do_GET(self) -> None:
        """Send a resource."""
        name = self._name()
        if name is None:
            return
        resource = self.server.resources.get(name)
        if resource is None:
            self._refuse(HTTPStatus.NOT_FOUND, f"There is no {name} here.")
        elif isinstance(resource, bytes):
            self._begin(HTTPStatus.OK, _TYPES.get(Path(name).suffix), len(resource))
            self.wfile.write(resource)
        else:
            with resource.open("rb") as file:
                self._begin(HTTPStatus.OK, _TYPES.get(resource.suffix), resource.stat().st_size)
                shutil.copyfileobj(file, self.wfile, 1 << 20)

    def do_POST(self) -> None:
        """Receive an event or an answer."""
        name = self._name()
        if name is None:
            return
        most, size = self.server.accepted.get(name), self.headers.get("Content-Length", "")
        if most is None:
            self._refuse(HTTPStatus.NOT_FOUND, f"Nothing is expected at {name}.")
        elif not size.isdecimal():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "The length is missing.")
        elif int(size) > most:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{name} has {size} bytes, and {most} are expected.")
        else:
            try:
                reply = self.server.receive(name, self.rfile.read(int(size)))
            except ValueError as error:
                self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            else:
                self._begin(HTTPStatus.OK, None, len(reply))
                self.wfile.write(reply)

    def _name(self) -> str | None:
        """Return the name that is asked for; None, and the request is refused, without the token.

        The host is checked too: it refuses a page elsewhere whose own name resolves to this address.
        """
        token, _, name = unquote(self.path).removeprefix("/").partition("/")
        known = secrets.compare_digest(token.encode(), self.server.token.encode())
        if known and self.headers.get("Host") == f"{LOOPBACK}:{self.server.server_port}":
            return name
        self._refuse(HTTPStatus.FORBIDDEN, "This is not for you.")
        return None

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        # The body is not read, so that no request can follow it.
        self.close_connection = True
        body = reason.encode()
        self._begin(status, "text/plain; charset=utf-8", len(body))
        self.wfile.write(body)

    def _begin(self, status: HTTPStatus, kind: str | None, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind or "application/octet-stream")
        self.send_header("Content-Length", str(size))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: standard error is for people."""
