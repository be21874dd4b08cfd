"""Bodies of requests: how long they may take, and how many are held and read at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from glmexport.serving.failure import ClientGone, Refused
from glmexport.serving.limits import ServingLimits

#: Number of bodies that are read at a time: each may take many times its size in memory, and time of the interpreter.
_READERS = 2

#: A connection that carried a body of which more may come cannot carry another request.
CLOSE = {"Connection": "close"}

T = TypeVar("T")


class Bodies:
    """All bodies that arrive, or wait to be read."""

    def __init__(self, limits: ServingLimits) -> None:
        self._limits = limits
        self._held = 0
        self._futures: set[Future[Any]] = set()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reading")

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncGenerator[bytes]:
        """Provide the whole body of a request, which counts as held until the context is left.

        Raises:
            Refused: it is too large, or too slow, or with the others there are too many bytes.
            ClientGone: the client has gone.
        """
        parts: list[bytes] = []
        try:
            await self._arrive(request, parts)
            yield b"".join(parts)
        finally:
            self._held -= sum(map(len, parts))

    async def _arrive(self, request: Request, parts: list[bytes]) -> None:
        """Take all parts of a body; what was taken is in ``parts`` even where it is refused."""
        limits = self._limits
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limits.body_bytes:
            raise self._too_large()
        size, begun = 0, asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(begun + min(limits.body_s, limits.body_pause_s)) as patience:
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    self._held += len(part)
                    self._check(size)
                    patience.reschedule(begun + min(limits.body_s, limits.body_pause_s + size / limits.bytes_per_s))
        except TimeoutError as error:
            raise Refused(408, "The body did not arrive in time.", headers=CLOSE) from error
        except ClientDisconnect as error:
            raise ClientGone from error

    async def read(self, work: Callable[[], T]) -> T:
        """Return what ``work`` makes of a body, in a thread, so that others need not wait for it."""
        future = self._readers.submit(work)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return await asyncio.wrap_future(future)

    @property
    def reading(self) -> bool:
        """Whether a thread still reads a body."""
        return any(future.running() for future in list(self._futures))

    def close(self) -> None:
        """Read nothing more, and wait for nobody."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _check(self, size: int) -> None:
        if size > self._limits.body_bytes:
            raise self._too_large()
        if self._held > self._limits.bodies_bytes:
            raise Refused(503, "Too many bodies arrive at a time.", headers={**CLOSE, "Retry-After": "1"})

    def _too_large(self) -> Refused:
        return Refused(413, f"A body has at most {self._limits.body_bytes} bytes.", code="too_large", headers=CLOSE)
