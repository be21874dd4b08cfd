"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glmexport.serving.failure import FAILED, ClientGone, Refused

_DONE = b"data: [DONE]\n\n"


def encode_event(document: dict[str, Any]) -> bytes:
    """Return one event as bytes; JSON has no line break of its own."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A response that sends ``documents`` as they come."""

    media_type = "text/event-stream"

    def __init__(self, documents: AsyncGenerator[dict[str, Any]]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._documents = documents

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, by the interface of ASGI."""
        async with aclosing(self._documents):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

            async def pass_on(data: bytes, more: bool = True) -> None:
                await send({"type": "http.response.body", "body": data, "more_body": more})

            # Who has gone is told nothing more.
            with suppress(ClientGone):
                try:
                    async for document in self._documents:
                        await pass_on(encode_event(document))
                except Refused as refused:
                    await pass_on(encode_event(refused.document))
                except Exception:
                    # Whatever it is, the client is told that the answer is not whole; who called logs it.
                    await pass_on(encode_event(FAILED.document))
                    await pass_on(_DONE, more=False)
                    raise
                await pass_on(_DONE, more=False)
