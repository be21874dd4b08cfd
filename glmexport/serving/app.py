"""The HTTP surface: the answer of each path."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from glmexport.foundation.errors import InputError
from glmexport.serving.answer import End, Event, Failed, Order, PendingAnswer
from glmexport.serving.body import Bodies
from glmexport.serving.failure import FAILED, ClientGone, Refused
from glmexport.serving.fields import ChatRequest, CompletionRequest, TextRequest, read_body
from glmexport.serving.guard import KEY, REQUEST
from glmexport.serving.guides import Crowded, Guide, Guides
from glmexport.serving.log import described
from glmexport.serving.metrics import Metrics
from glmexport.serving.orders import RequestReader
from glmexport.serving.reply import ChatReply, Reply, ReplyHead, TextReply
from glmexport.serving.scheduler import Closed, Full, Scheduler
from glmexport.serving.stream import EventStream
from glmexport.serving.text import AnswerText, TextPart

#: Seconds after which a client that was refused for a while may try again.
_RETRY = {"Retry-After": "1"}

_log = logging.getLogger("glmexport.serving")

T = TypeVar("T", bound=CompletionRequest)
R = TypeVar("R")


@dataclass(frozen=True)
class ServedBundle:
    """The facts about the bundle that is served. ``created``: when the bundle was written, in Unix time.

    ``directory``: name of its folder.
    """

    name: str
    directory: str
    digest: str
    family: str
    target: str
    context_length: int
    created: int


class Service:
    """A bundle served by ``scheduler``. ``draining``: whether the server is about to end."""

    def __init__(
        self,
        facts: ServedBundle,
        reader: RequestReader,
        scheduler: Scheduler,
        metrics: Metrics,
        guides: Guides | None = None,
    ) -> None:
        self._facts = facts
        self._reader = reader
        self._scheduler = scheduler
        self._metrics = metrics
        self._guides = guides
        self._limits = replace(reader.limits, prompt_ids=reader.context_length)
        self._bodies = Bodies(reader.limits)
        self.draining = False
        self._given_up = False
        #: The queue of every answer that somebody waits for.
        self._queues: set[asyncio.Queue[Event | None]] = set()

    def application(self) -> Starlette:
        """Return the application with its routes."""
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._text, methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/healthz", self._health, methods=["GET"]),
            Route("/readyz", self._ready, methods=["GET"]),
            Route("/metrics", self._measures, methods=["GET"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: _unrouted, Refused: _refused, ClientGone: _gone, Exception: _failed}
        application = Starlette(routes=routes, exception_handlers=handlers)
        application.router.redirect_slashes = False
        return application

    def give_up(self) -> None:
        """End every answer with a failure; no other is begun."""
        self._given_up = True
        if self._guides:
            self._guides.close()
        for queue in self._queues:
            queue.put_nowait(Failed(_ending()))

    def close(self) -> None:
        """Read no more requests; nobody waits for those that are being read."""
        self._bodies.close()

    @property
    def reading(self) -> bool:
        """Whether a request is still being read."""
        return self._bodies.reading

    async def _chat(self, request: Request) -> Response:
        asked, (order, grammar) = await self._read(request, ChatRequest, self._reader.chat)
        if order.guide:
            await self._tried(order.guide)
        head = ReplyHead.new("chatcmpl", self._facts.name)
        reply = ChatReply(head, grammar, self._reader.spell, self._metrics, logprobs=asked.logprobs)
        return await self._answered(request, asked, order, self._reader.decoding(order, chat=True), reply)

    async def _tried(self, guide: Guide) -> None:
        """Refuse what no answer can be held to before the request waits for its turn."""
        assert self._guides is not None
        try:
            await asyncio.wrap_future(self._guides.tried(guide))
        except Crowded as error:
            raise Refused(429, "Too many schemas wait.", code="queue_full", headers=_RETRY) from error
        except InputError as error:
            raise _ending() if self._guides.closed else Refused(400, str(error), "response_format") from error

    async def _text(self, request: Request) -> Response:
        asked, order = await self._read(request, TextRequest, self._reader.text)
        head = ReplyHead.new("cmpl", self._facts.name)
        likely, ids = asked.logprobs is not None, asked.return_token_ids
        reply = TextReply(head, self._reader.spell, order.prompt, logprobs=likely, ids=ids)
        return await self._answered(request, asked, order, self._reader.decoding(order, chat=False), reply)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described]})

    async def _model(self, request: Request) -> Response:
        self._known(request.path_params["name"])
        return JSONResponse(self._described)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        status = "draining" if self.draining else "ready" if self._scheduler.ready else "loading"
        names = ("digest", "directory", "family", "target")
        facts = {name: getattr(self._facts, name) for name in names}
        return JSONResponse({"status": status, "model": self._facts.name, **facts}, 200 if status == "ready" else 503)

    async def _measures(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @property
    def _described(self) -> dict[str, object]:
        facts = self._facts
        named = {"id": facts.name, "object": "model", "created": facts.created, "owned_by": "glmexport"}
        return {**named, "max_model_len": facts.context_length, "digest": facts.digest}

    def _known(self, name: str | None) -> None:
        if name not in (None, self._facts.name):
            raise Refused(404, f"There is no such model; this is {self._facts.name}.", "model", "model_not_found")

    async def _read(self, request: Request, model: type[T], order: Callable[[T], R]) -> tuple[T, R]:
        """The request's body as ``model``, and what is ordered by it."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(400, "The body has to be application/json.", code="unsupported_content_type")

        def read(data: bytes) -> tuple[T, R]:
            asked = read_body(data, model, self._limits)
            self._known(asked.model)
            return asked, order(asked)

        async with self._bodies.body(request) as data:
            return await self._bodies.read(partial(read, data))

    async def _answered(
        self, request: Request, asked: CompletionRequest, order: Order, text: AnswerText, reply: Reply
    ) -> Response:
        """The answer, as a stream if that was asked for."""
        events = self._events(request, order, text)
        if asked.stream:
            # What fails before there is anything to show is told by the status.
            first = await anext(events)
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return EventStream(_chunks(first, events, reply, usage))
        async with aclosing(events):
            async for event in events:
                if isinstance(event, End):
                    deque(reply.end(event), 0)
                    return JSONResponse(reply.whole(event))
                deque(reply.part(event), 0)
        raise ClientGone

    async def _events(self, request: Request, order: Order, text: AnswerText) -> AsyncGenerator[TextPart | End]:
        """Parts and the end of the answer to ``order``; when nobody listens any more, it is cancelled.

        Raises:
            Refused: it cannot be given, or not be finished.
            ClientGone: the client has gone.
        """
        if self._given_up:
            raise _ending()
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        order = replace(order, key=request.scope["state"][KEY])
        answer = PendingAnswer(order, text, listen, self._metrics.gap.observe)
        try:
            self._scheduler.submit(answer)
        except Full as error:
            raise Refused(429, "Too many requests wait.", code="queue_full", headers=_RETRY) from error
        except Closed as error:
            raise _ending() from error
        self._queues.add(queue)
        watch = asyncio.create_task(_until_gone(request, queue))
        try:
            while not isinstance(event := await queue.get(), End):
                if event is None:
                    raise ClientGone
                if isinstance(event, Failed):
                    raise _refusal(event.error, request)
                yield event
            yield event
        finally:
            answer.cancelled = True
            self._queues.discard(queue)
            watch.cancel()


async def _until_gone(request: Request, queue: asyncio.Queue[Event | None]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    queue.put_nowait(None)


async def _chunks(
    first: TextPart | End, rest: AsyncGenerator[TextPart | End], reply: Reply, usage: bool
) -> AsyncGenerator[dict[str, Any]]:
    """Everything that a stream carries, ``first`` being what came before it was begun."""
    async with aclosing(rest):
        for chunk in reply.begin():
            yield chunk
        event: TextPart | End = first
        while isinstance(event, TextPart):
            for chunk in reply.part(event):
                yield chunk
            event = await anext(rest)
        for chunk in reply.end(event):
            yield chunk
        if usage:
            yield reply.usage_chunk(event)


def _ending() -> Refused:
    return Refused(503, "The server is about to end.", code="draining", headers=_RETRY)


def _refusal(error: Exception, request: Request) -> Refused:
    """Return what a client is told of a failure in the engine."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, InputError):
        return Refused(400, str(error))
    _log.error("The answer to request %s failed: %s.", request.scope["state"][REQUEST], described(error))
    if isinstance(error, MemoryError):
        return Refused(503, "There is not enough memory for this request.", headers=_RETRY)
    return Refused(500, "The model failed on this request; the log says where, at the name in X-Request-Id.")


async def _refused(request: Request, error: Refused) -> Response:
    return error.response


async def _gone(request: Request, error: ClientGone) -> Response:
    # Nobody reads it; counters do.
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return FAILED.response


async def _unrouted(request: Request, error: HTTPException) -> Response:
    """There is nothing at a path, or not by that method."""
    message = "There is nothing here." if error.status_code == 404 else "This path has other methods."
    return Refused(error.status_code, message, headers=error.headers or {}).response
