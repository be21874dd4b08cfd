"""The thread that owns the model: who waits, who is refused, who has gone, and what cannot be loaded."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import PATIENCE_S
from test_turns import prompt_of

from glmexport.bundle.bundle import Bundle
from glmexport.engine.sampling import Sampling
from glmexport.foundation.errors import BundleError
from glmexport.serving.answer import End, Event, Failed, Order, PendingAnswer
from glmexport.serving.app import ServedBundle, Service
from glmexport.serving.guard import AccessRules, Guard
from glmexport.serving.guides import Guide, Guides
from glmexport.serving.limits import ServingLimits
from glmexport.serving.metrics import Metrics
from glmexport.serving.orders import RequestReader
from glmexport.serving.scheduler import Closed, Full, Scheduler, SchedulerOptions
from glmexport.serving.text import AnswerText, Decoder
from glmexport.tokenizer.tokenizer import Tokenizer

ENDS = frozenset({256})


class Waiting:
    """A scheduler that is not started yet, and what it tells."""

    def __init__(self, directory: Path, guides: Guides | None = None, **options: Any) -> None:
        self.tokenizer, self.guides = Tokenizer.open(directory), guides
        self.loaded, self.errors = threading.Event(), queue.Queue[Exception]()
        self.metrics = Metrics()
        settings = SchedulerOptions(threads=1, **options)
        bundle = Bundle.open(directory)
        self.scheduler = Scheduler(bundle, settings, self.metrics, self.loaded.set, self.errors.put, guides)

    def submit(
        self, text: str, count: int = 8, leaves: bool = False, guide: Guide | None = None
    ) -> tuple[PendingAnswer, queue.Queue[Event]]:
        """A request, and where its events come; whoever ``leaves`` does so at the first of them."""
        told: queue.Queue[Event] = queue.Queue()
        order = Order(prompt_of(self.tokenizer, text), count, Sampling(0), ends=ENDS, guide=guide)

        def listen(event: Event) -> None:
            answer.cancelled |= leaves
            told.put(event)

        answer = PendingAnswer(order, AnswerText(Decoder(self.tokenizer), ()), listen, lambda _: None)
        self.scheduler.submit(answer)
        return answer, told


def last(told: queue.Queue[Event]) -> Event:
    while not isinstance(event := told.get(timeout=PATIENCE_S), (End, Failed)):
        pass
    return event


def test_who_waits_while_it_loads_is_answered_in_order(bundle: Path) -> None:
    waiting = Waiting(bundle, parallel=1, waiting=2)
    (first, first_told), (second, second_told) = waiting.submit("Hi!"), waiting.submit("Hello")
    with pytest.raises(Full):
        waiting.submit("Hi?")
    # One who has gone makes room.
    second.cancelled = True
    third, third_told = waiting.submit("Hi!", 2)
    waiting.scheduler.start()
    ends = [last(first_told), last(third_told)]
    assert [end.reason for end in ends if isinstance(end, End)] == [
        "stop" if len(first.tokens) < 8 else "length",
        "length",
    ]
    assert third.timing.begun >= first.timing.last and waiting.loaded.is_set()
    waiting.scheduler.close()
    assert waiting.scheduler.join(PATIENCE_S) and second_told.empty() and not second.tokens
    with pytest.raises(Closed):
        waiting.submit("Hi!")


def test_one_who_goes_is_left_at_the_next_token(bundle: Path) -> None:
    waiting = Waiting(bundle)
    answer, told = waiting.submit("Endless~", 3900, leaves=True)
    waiting.scheduler.start()
    told.get(timeout=PATIENCE_S)
    _, other = waiting.submit("Hi!")
    assert isinstance(last(other), End)
    waiting.scheduler.close()
    assert waiting.scheduler.join(PATIENCE_S) and len(answer.tokens) == 1
    assert b'glmexport_requests_total{end="cancelled"} 1.0' in waiting.metrics.text()


def test_what_cannot_be_loaded_is_told_to_who_waits(bundle: Path, tmp_path: Path) -> None:
    for path in bundle.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    waiting = Waiting(tmp_path)
    _, told = waiting.submit("Hi!")
    waiting.scheduler.start()
    failed = last(told)
    assert isinstance(failed, Failed) and isinstance(failed.error, BundleError)
    assert waiting.errors.get(timeout=PATIENCE_S) is failed.error and not waiting.scheduler.ready
    with pytest.raises(Closed):
        waiting.submit("Hi!")


def surface(waiting: Waiting, bundle: Path, limits: ServingLimits) -> tuple[Guard, Service]:
    """What answers requests to the scheduler, without a socket."""
    opened = Bundle.open(bundle)
    context = opened.context_length
    family = opened.manifest.family
    facts = ServedBundle("tiny", opened.name, opened.digest, family, opened.target.name, context, created=0)
    guided = waiting.guides is not None
    reader = RequestReader(waiting.tokenizer, opened.ends, context, limits, guides=guided, lenient=False)
    service = Service(facts, reader, waiting.scheduler, waiting.metrics, waiting.guides)
    return Guard(service.application(), AccessRules(), waiting.metrics), service


def client_of(guard: Guard) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(guard)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=PATIENCE_S)


def test_it_is_ready_when_the_model_is_there(bundle: Path) -> None:
    """And a request that comes before is answered, not refused."""
    waiting = Waiting(bundle)
    guard, service = surface(waiting, bundle, ServingLimits())

    async def ask() -> None:
        async with client_of(guard) as http:
            loading = await http.get("/readyz")
            assert (loading.status_code, loading.json()["status"]) == (503, "loading")
            assert (await http.get("/healthz")).status_code == 200
            body = {"messages": [{"role": "user", "content": "Hi!"}], "temperature": 0}
            early = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            await asyncio.sleep(0)
            waiting.scheduler.start()
            assert (await early).status_code == 200
            ready = await http.get("/readyz")
            assert (ready.status_code, ready.json()["digest"]) == (200, Bundle.open(bundle).digest)
            service.draining = True
            draining = await http.get("/readyz")
            assert (draining.status_code, draining.json()["status"]) == (503, "draining")

    asyncio.run(ask())
    waiting.scheduler.close()
    assert waiting.scheduler.join(PATIENCE_S)


def test_a_body_that_does_not_come(bundle: Path) -> None:
    guard, _ = surface(Waiting(bundle), bundle, ServingLimits(body_s=0.1))

    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(PATIENCE_S)

    async def ask() -> None:
        async with client_of(guard) as http:
            headers = {"content-type": "application/json"}
            late = await http.post("/v1/chat/completions", content=never(), headers=headers)
            assert late.status_code == 408 and late.json()["error"]["type"] == "timeout_error"

    asyncio.run(ask())


def test_a_thread_that_fails_ends_the_server(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At what is no single answer's: who waits is told, and nobody is taken any more."""
    waiting, failure = Waiting(bundle), RuntimeError("no turn")

    def fails(*_: object) -> None:
        raise failure

    monkeypatch.setattr("glmexport.serving.scheduler._Shift._begin", fails)
    waiting.submit("Hi!")
    _, behind = waiting.submit("Hi!")
    waiting.scheduler.start()
    assert waiting.errors.get(timeout=PATIENCE_S) is failure
    failed = last(behind)
    assert isinstance(failed, Failed) and failed.error is failure and not waiting.scheduler.ready
    with pytest.raises(Closed):
        waiting.submit("Hi!")
