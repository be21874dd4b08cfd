"""One connection: HTTP as h11 reads it, more strictly, and a time limit for everything that a client has to do.

What a connection waits for is either the client or the server. A client has a time for the head of its request, for
its body (see ``body``), for taking its answer, and between two requests; where none is left, the connection ends.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import h11
import uvicorn
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from glmexport.serving.failure import Refused
from glmexport.serving.limits import ServingLimits

#: Seconds in which a connection may bring its first request after the server stopped accepting, and another one.
LATE_S, LATE_AGAIN_S = 2.0, 0.25

_HEAD_BYTES = 16 << 10
_HEAD_END = re.compile(rb"\r?\n\r?\n")


class RequestParser(h11.Connection):
    """A reader of requests that refuses one whose end another reader, such as a proxy, could see elsewhere.

    ``next_event`` raises ``h11.RemoteProtocolError`` for what h11 lets through: a length beside a coding, or given
    twice; folded lines, and lines that end without CR; and a body in too many ``chunks``, which take long to read.
    """

    def __init__(self, chunks: int) -> None:
        super().__init__(h11.SERVER, _HEAD_BYTES)
        self._most = chunks
        self._chunks = 0

    def next_event(self) -> Any:
        """Return the next event as h11 does, and check it."""
        head = self.trailing_data[0] if self.their_state is h11.IDLE else b""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = 0
            end = _HEAD_END.search(head)
            _check_head(head[: end.end() if end else None])
        elif isinstance(event, h11.Data) and event.chunk_start:
            self._chunks += 1
            if self._chunks > self._most:
                raise h11.RemoteProtocolError("The body comes in too many chunks.")
        return event


def _check_head(head: bytes) -> None:
    lines = head.split(b"\n")
    if any(not line.endswith(b"\r") for line in lines[:-1]):
        raise h11.RemoteProtocolError("A line does not end with CR and LF.")
    if any(line.startswith((b" ", b"\t")) for line in lines[1:]):
        raise h11.RemoteProtocolError("A line of the head is folded.")
    fields = [(name.strip().lower(), value) for name, _, value in (line.partition(b":") for line in lines[1:])]
    lengths = [value for name, value in fields if name == b"content-length"]
    coded = any(name == b"transfer-encoding" for name, _ in fields)
    if len(lengths) + coded > 1 or any(b"," in value for value in lengths):
        raise h11.RemoteProtocolError("The length of the body is given twice.")
    if coded and b"HTTP/1.0" in lines[0]:
        raise h11.RemoteProtocolError("HTTP/1.0 has no codings.")


class Connection(H11Protocol):
    """A connection of uvicorn's with the times of ``limits``. ``lost`` is called when it has ended.

    ``ending``: whether the server has stopped accepting. One that was accepted before may still bring a request for a
    while.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        limits: ServingLimits,
        ending: Callable[[], bool],
        lost: Callable[[Connection], None],
    ) -> None:
        super().__init__(config, state, {})
        self.conn = RequestParser(limits.chunks)
        self.app = self._application
        self._limits = limits
        self._ending = ending
        self._lost = lost
        #: The time at which the wait for a request, or for its rest, began.
        self._since = self.loop.time()
        self._received = 0
        self._head: asyncio.TimerHandle | None = None
        #: Seconds for which the client may yet be slow with this answer, beside the time that its size takes.
        self._patience_s = limits.send_s
        self._paused_at: float | None = None
        self._allowed_s = 0.0
        self._late: asyncio.TimerHandle | None = None

    @property
    def awaited_since(self) -> float | None:
        """Since when nothing but the client is waited for, by the loop's clock; None: it is the server's turn."""
        if self._paused_at is not None:
            return self._paused_at
        idle = self.cycle is None or self.cycle.response_complete
        return self._since if idle or self.conn.their_state is h11.SEND_BODY else None

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that the client has brought, and bytes that it has not taken yet."""
        return self._received, self.transport.get_write_buffer_size() if self.transport else 0

    def leave(self) -> None:
        """End the connection now; what the client has not taken is lost."""
        if self.transport:
            self.transport.abort()

    def connection_made(self, transport: Any) -> None:
        """Take over a new connection, as asyncio calls it."""
        super().connection_made(transport)
        # Then writing is paused whenever the client has something to take, and at no other time.
        transport.set_write_buffer_limits(high=0)
        self._head = self.loop.call_later(self._limits.head_s, self._close)
        if self._ending():
            self.shutdown()

    def data_received(self, data: bytes) -> None:
        """Take data, as asyncio calls it."""
        self._received += len(data)
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._arrived()
        elif self._head is None:
            self._head = self.loop.call_later(self._limits.head_s, self._close)
        if self._ending() and self.cycle is not None:
            self.cycle.keep_alive = False

    def connection_lost(self, exc: Exception | None) -> None:
        """Take note of the end of the connection, as asyncio calls it."""
        self._arrived()
        self._unset_keepalive_if_required()
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)
        self._lost(self)

    def pause_writing(self) -> None:
        """Start the client's time to take what was written, as it does not take it now."""
        super().pause_writing()
        self._paused_at = self.loop.time()
        self._allowed_s = self._patience_s + self.transport.get_write_buffer_size() / self._limits.bytes_per_s
        self._late = self.loop.call_later(self._allowed_s, self.leave)

    def resume_writing(self) -> None:
        """Stop that time, as the client has taken everything."""
        super().resume_writing()
        if self._late is not None and self._paused_at is not None:
            self._late.cancel()
            left_s = self._allowed_s - (self.loop.time() - self._paused_at)
            self._patience_s = max(0.0, min(self._patience_s, left_s))
        self._late = self._paused_at = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, where no answer has begun, and end the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            # Whoever reads the body is told that the client has gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(Refused(400, "This is no request of HTTP that can be read safely.").document).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            # To HEAD there is no body, whatever is sent.
            with suppress(h11.LocalProtocolError):
                for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def on_response_complete(self) -> None:
        """Take note that a response is complete, as uvicorn calls it."""
        self._since = self.loop.time()
        super().on_response_complete()

    def shutdown(self) -> None:
        """Take note that the server has stopped accepting."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LATE_S if self.cycle is None else LATE_AGAIN_S, self._close_idle)
        else:
            self.cycle.keep_alive = False

    async def _application(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The server's, in an answer that ends the connection where the request's body has not come by then."""
        self._patience_s = self._limits.send_s

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and self.conn.their_state is h11.SEND_BODY:
                others = [header for header in message["headers"] if header[0].lower() != b"connection"]
                message = {**message, "headers": [*others, (b"connection", b"close")]}
            await send(message)

        await self.config.loaded_app(scope, receive, answer)

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
