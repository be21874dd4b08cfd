"""A time limit of a whole answer, however slowly its parts come: a client's own limits are for each part."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Any


class Deadline:
    """A limit that cuts the connection of one request whose answer has not ended in ``seconds``.

    ``trace`` is for the extension of that name of httpx2, of a request that has a connection of its own.
    """

    def __init__(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._started = False
        self._socket: socket.socket | None = None
        #: Whether the time is over.
        self.passed = False

    def __enter__(self) -> Deadline:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._socket:
            self._socket.close()

    def trace(self, event: str, facts: dict[str, Any]) -> None:
        """Take note of the connection, and of the end of the request."""
        if event == "connection.connect_tcp.complete":
            # A second name for it: TLS takes the first one over.
            self._socket = socket.socket(fileno=os.dup(facts["return_value"].get_extra_info("socket").fileno()))
        elif event.endswith("send_request_body.complete") and not self._started:
            self._started = True
            self._timer.start()

    def stop(self) -> None:
        """Lift the limit, so that the answer may take any time."""
        self._timer.cancel()

    def _cut(self) -> None:
        self.passed = True
        with contextlib.suppress(OSError):
            if self._socket:
                self._socket.shutdown(socket.SHUT_RDWR)
