"""Schemas that would stop a server: each is refused or answered, and everything else is answered meanwhile."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from guide_graph import PATH
from guide_graph import guide_graph as graph_of
from scripted import ROWS
from served import PATIENCE_S, Served, start

import glmexport.serving.guides
from glmexport.bundle.genai_config import GenaiConfig
from glmexport.engine.sampling import Sampling
from glmexport.foundation.errors import InputError, MachineError
from glmexport.serving.failure import Refused
from glmexport.serving.guides import COMPILE_S, PLACEHOLDER, Crowded, Guide, Guides, guide_graph
from glmexport.serving.schemas import check_schema
from glmexport.tokenizer.tokenizer import Tokenizer

YES = {"type": "object", "properties": {"a": {"enum": ["yes", "no"]}}, "required": ["a"], "additionalProperties": False}
CHOSEN = Guide("json_schema", json.dumps(YES))


def automata(count: int) -> dict[str, Any]:
    """Patterns of which each one's automaton has 2**k states, all to be matched together."""
    return {"allOf": [{"type": "string", "pattern": f"^(a|b)*a(a|b){{{k}}}$"} for k in range(1, count)]}


def nested(key: str, count: int, depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string", "minLength": count, "maxLength": count}
    for _ in range(depth):
        inner = {"type": "array", "items": inner, key: count}
    return inner


def branching(depth: int) -> dict[str, Any]:
    """Alternatives of alternatives, 4 ** depth in all, by references."""
    last = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    levels = {f"l{n}": {"anyOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 4} for n in range(depth)}
    return {"$defs": {**levels, f"l{depth}": last}, "$ref": "#/$defs/l0"}


def test_the_graph_is_whole_for_any_vocabulary() -> None:
    """Its file is what the onnx package writes, and the size goes to its place and nowhere else."""
    assert PATH.read_bytes().count(PLACEHOLDER) == 1
    assert onnx.load(PATH) == graph_of(PLACEHOLDER)
    for vocabulary in (1, 1024, 151552):
        model = onnx.load_from_string(guide_graph(vocabulary))
        onnx.checker.check_model(model, full_check=True)
        assert model == graph_of(vocabulary.to_bytes(8, "little"))
        session = onnxruntime.InferenceSession(guide_graph(vocabulary), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"input_ids": np.zeros((1, 3), np.int64)})
        assert logits.shape == (1, 3, vocabulary) and logits.dtype == np.float32 and not logits.any()


TOO_LARGE: dict[str, dict[str, Any]] = {
    "minItems": {"type": "array", "minItems": 1_000_000_000},
    "maxItems": {"type": "object", "properties": {"a": {"type": "array", "maxItems": 10**12}}},
    "minLength": {"type": "string", "minLength": 10**9},
    "maxLength": {"anyOf": [{"type": "string", "maxLength": 10**300}]},
    "minProperties": {"type": "object", "minProperties": 10**9},
    "maxProperties": {"type": "object", "maxProperties": 10.0**9},
    "multipleOf": {"type": "number", "multipleOf": 1e-300},
    "repetitions": {"type": "string", "pattern": "a{1,100000}"},
    "digits": {"type": "string", "pattern": "a{" + "9" * 900 + "}"},
    "pattern": {"type": "string", "pattern": "(a|b)" * 1000},
    "names by pattern": {"type": "object", "patternProperties": {"x{99999}": {}}},
    "branches": {"allOf": [{"type": "string"}] * 1001},
    "values": {"enum": list(range(30_000))},
    "characters": {"const": "x" * 200_000},
}
#: Small enough to be tried.
TRIED: dict[str, dict[str, Any]] = {
    "automata": automata(36),
    "one automaton": {"type": "string", "pattern": "^(a|b)*a(a|b){900}$"},
    "repetitions of repetitions": {"type": "string", "pattern": "((((a{1,999}){1,999}){1,999}){1,999})*b"},
    "items of items": nested("minItems", 100_000, 8),
    "properties": {"type": "object", "required": [f"p{n}" for n in range(900)], "minProperties": 50_000},
    "branching": branching(30),
    "a reference to itself": {"$ref": "#"},
    "references in a circle": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}] * 9}}, "$ref": "#/$defs/a"},
    "divisors": {"allOf": [{"type": "integer", "multipleOf": n} for n in (99991, 99989, 99971, 99961, 99929)] * 9},
    "nonsense": {"type": "nonsense"},
    "objects": {"anyOf": [{"type": "object", "properties": {f"k{n}": {"pattern": ".*a.{99}"}}} for n in range(500)]},
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_too_large_is_refused_at_once(name: str) -> None:
    with pytest.raises(Refused) as refused:
        check_schema(TOO_LARGE[name], "response_format")
    assert refused.value.status == 400 and refused.value.param == "response_format"


def test_what_clients_send_is_not_too_large() -> None:
    usual = {"type": "array", "minItems": 1, "maxItems": 5000, "items": {"type": "string", "pattern": r"^\d{4}-\d{2}$"}}
    for schema in (YES, usual, {"const": {"a": {"minItems": 10**9}}}, {"type": "number", "multipleOf": 0.01}):
        check_schema(schema, "response_format")


class Pulse:
    """How long /healthz was silent at most, asked all the time from another thread."""

    def __init__(self, served: Served) -> None:
        self.silence_s = 0.0
        self._served = served
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        with self._served.http() as http:
            while not self._stop.is_set():
                begun = time.monotonic()
                assert http.get("/healthz").status_code == 200
                self.silence_s = max(self.silence_s, time.monotonic() - begun)
                self._stop.wait(0.02)


def held_to(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return {"messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 4, "response_format": form, **more}


@pytest.mark.parametrize("name", [*TRIED, "minItems"])
def test_no_schema_stops_the_server(served: Served, name: str) -> None:
    schema = {**TRIED, **TOO_LARGE}[name]
    with served.http() as http, Pulse(served) as pulse:
        begun = time.monotonic()
        answer = http.post("/v1/chat/completions", json=held_to(schema))
        seconds = time.monotonic() - begun
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert "schema" in answer.json()["error"]["message"]
    assert answer.status_code == 400 or name not in ("automata", "minItems", "nonsense")
    # On a busy machine, too; it was 200 s.
    assert seconds < 10 * COMPILE_S and pulse.silence_s < COMPILE_S
    with served.http() as http:
        assert http.post("/v1/chat/completions", json=held_to(YES)).status_code == 200


def test_many_such_schemas_at_once(served: Served) -> None:
    """Others are answered, and those for whom there is no room are told so."""
    codes: list[int] = []

    def ask(number: int) -> None:
        with served.http() as http:
            attack = {**automata(36), "title": str(number)}
            codes.append(http.post("/v1/chat/completions", json=held_to(attack)).status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    with Pulse(served) as pulse, served.http() as http:
        for thread in threads:
            thread.start()
        plain = {"messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 4}
        assert http.post("/v1/chat/completions", json=plain).status_code == 200
        # The rest is not waited for by anybody.
        deadline = time.monotonic() + PATIENCE_S
        while len(codes) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert {*codes} <= {400, 429} and 429 in codes and pulse.silence_s < COMPILE_S
    for thread in threads:
        thread.join(PATIENCE_S)


def test_a_server_ends_while_a_schema_is_tried(bundle: Path) -> None:
    server = start(bundle, "--name", "tiny", "--drain-s", 0.5)
    asking = threading.Thread(target=lambda: _sent(server, held_to(automata(36))))
    asking.start()
    time.sleep(0.7)
    begun = time.monotonic()
    assert server.stop() == 0 and time.monotonic() - begun < 10 * COMPILE_S
    asking.join(PATIENCE_S)


def _sent(server: Served, body: dict[str, Any]) -> None:
    import httpx

    try:
        with server.http() as http:
            http.post("/v1/chat/completions", json=body)
    except httpx.TransportError:
        pass


@pytest.fixture
def guides(bundle: Path) -> Iterator[Guides]:
    made = Guides(bundle, GenaiConfig.read(bundle))
    yield made
    made.close()


def text_of(guides: Guides, bundle: Path, guide: Guide, sampling: Sampling) -> str:
    generator, tokens = np.random.default_rng(1), list[int]()
    held = guides.begin(guide, sampling, 60)
    for _ in range(60):
        logits = generator.standard_normal(ROWS).astype(np.float32)
        while (chosen := held.choose(logits)) is None:
            pass
        if chosen.token is not None:
            tokens.append(chosen.token)
        if chosen.done:
            break
    held.close()
    return Tokenizer.open(bundle).decode(tokens)


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, 0.9, seed=5)], ids=["greedy", "sampled"])
def test_tokens_are_chosen_among_those_that_are_allowed(guides: Guides, bundle: Path, sampling: Sampling) -> None:
    """Whatever the logits say, and the same for the same logits and seed."""
    first = text_of(guides, bundle, CHOSEN, sampling)
    assert json.loads(first) in ({"a": "yes"}, {"a": "no"})
    assert text_of(guides, bundle, CHOSEN, sampling) == first


def test_the_process_has_nothing_of_the_server(guides: Guides, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_OF_THE_SERVER", "s3cret")
    with (tmp_path / "key").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)
        guides.tried(CHOSEN).result()
    process = guides._take()
    folder = Path(f"/proc/{process._process.pid}")
    assert b"s3cret" not in (folder / "environ").read_bytes()
    opened = {str(link.readlink()) for link in (folder / "fd").iterdir()}
    assert str(tmp_path / "key") not in opened
    assert sum(name.startswith("socket:") for name in opened) == 1
    process.close()
    assert not folder.exists()


def test_a_process_serves_several_answers_one_after_the_other(guides: Guides, bundle: Path) -> None:
    guides.tried(CHOSEN).result()
    (process,) = guides._spare
    for _ in range(3):
        assert text_of(guides, bundle, CHOSEN, Sampling(0)).startswith("{")
    assert guides._spare == [process]
    held = guides.begin(CHOSEN, Sampling(0), 9)
    held.close()
    assert guides._spare == [], "one that is at work is no other's"


def test_a_process_that_does_not_start_is_no_fault_of_the_schema(
    guides: Guides, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(glmexport.serving.guides, "_PROGRAM", tmp_path / "nothing.py")
    with pytest.raises(MachineError, match="ended with 2 before it was ready"):
        guides.tried(CHOSEN).result()


def test_a_token_that_takes_too_long(guides: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    held = guides.begin(CHOSEN, Sampling(0), 9)
    logits = np.zeros(ROWS, np.float32)
    while held.choose(logits) is None:
        pass
    monkeypatch.setattr(glmexport.serving.guides, "TOKEN_S", -1.0)
    held._process._process.send_signal(19)
    with pytest.raises(InputError, match="takes more time"):
        while True:
            held.choose(logits)
    held.close()


def test_a_grammar_that_takes_its_time_at_every_token(guides: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glmexport.serving.guides, "ANSWER_S", 0.0)
    held = guides.begin(CHOSEN, Sampling(0), 9)
    with pytest.raises(InputError, match="takes more time"):
        while True:
            held.choose(np.zeros(ROWS, np.float32))
    held.close()


def test_no_more_wait_than_may(guides: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glmexport.serving.guides, "_WAITING", 0)
    tried = [guides.tried(Guide("json_schema", json.dumps({**YES, "title": str(n)}))) for n in range(2)]
    with pytest.raises(Crowded):
        guides.tried(CHOSEN)
    assert [future.result() for future in tried] == [None, None]
    guides.tried(CHOSEN).result()
