"""A registry that means harm gets no password, no memory, no disk and no time of ours."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from glmexport.bundle.bundle import Bundle
from glmexport.foundation.errors import GlmexportError, InputError, MachineError, UnverifiedError
from glmexport.foundation.progress import Silent
from glmexport.release.access import ImageReference, RegistryAccess
from glmexport.release.layout import ARTIFACT_TYPE, FILE_PATH, write_layout
from glmexport.release.registry import Registry
from glmexport.release.transfer import pull, push

Handler = BaseHTTPRequestHandler
#: Bytes that Python holds at the most while it is attacked.
MOST = 64 << 20
CONTENT = b"weights"
BOMB = gzip.compress(bytes(4 << 20)) * 64
PASSWORD = RegistryAccess("ministry", "geheim")


def layer(name: str = "model.onnx", content: bytes = CONTENT, size: int | None = None) -> dict[str, object]:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    length = len(content) if size is None else size
    return {"mediaType": "x", "digest": digest, "size": length, "annotations": {FILE_PATH: name}}


def manifest(*layers: dict[str, object]) -> bytes:
    table = {"schemaVersion": 2, "artifactType": ARTIFACT_TYPE, "config": layer("", b"{}"), "layers": layers}
    return json.dumps(table).encode()


def give(handler: Handler, content: bytes, status: int = 200, **headers: str) -> None:
    """An honest answer."""
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(content))}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def without_end(handler: Handler, status: int = 200, **headers: str) -> None:
    """One that never ends."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * (1 << 20))


def drop_by_drop(handler: Handler) -> None:
    """One of which something comes now and then."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def headers_drop_by_drop(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


def informed_without_end(handler: Handler) -> None:
    while True:
        handler.wfile.write(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100)
        time.sleep(0.01)


def asking(realm: str) -> Callable[[Handler], None]:
    """Asks for a token from there."""
    challenge = f'Bearer realm="{realm}",service="s",scope="repository:models/glm:pull"'
    return lambda handler: give(handler, b"", 401, WWW_Authenticate=challenge)


@contextmanager
def serving(answer: Callable[[Handler], None]) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Host of a server, and the paths that it was asked for, each with who asked."""
    asked: list[tuple[str, str | None]] = []

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            try:
                answer(self)
            except OSError:
                self.close_connection = True

        do_HEAD = do_POST = do_PUT = do_PATCH = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def reference(host: str) -> ImageReference:
    return ImageReference.parse(f"{host}/models/glm:r7")


def blobs_after(content: bytes, answer: Callable[[Handler], None]) -> Callable[[Handler], None]:
    """An honest manifest, and ``answer`` to all else."""
    return lambda handler: give(handler, content) if "/manifests/" in handler.path else answer(handler)


def tokens_by(answer: Callable[[Handler], None]) -> Callable[[Handler], None]:
    """Asks for a token of its own, and gives it so."""

    def both(handler: Handler) -> None:
        if handler.path.startswith("/token"):
            answer(handler)
        else:
            asking(f"http://{handler.headers['Host']}/token")(handler)

    return both


ATTACKS: dict[str, Callable[[Handler], None]] = {
    "a manifest without end": without_end,
    "a manifest drop by drop": drop_by_drop,
    "headers drop by drop": headers_drop_by_drop,
    "hints without end": informed_without_end,
    "a manifest that unpacks": lambda handler: give(handler, BOMB, Content_Encoding="gzip"),
    "no manifest without end": lambda handler: without_end(handler, 404),
    "an error without end": lambda handler: without_end(handler, 500),
    "a question without end": lambda handler: without_end(handler, 401, WWW_Authenticate="Basic"),
    "a redirection without end": lambda handler: without_end(handler, 307, Location="/again"),
    "redirections without end": lambda handler: give(handler, b"", 307, Location=handler.path + "x"),
    "an address that is none": lambda handler: give(handler, b"", 307, Location="http://[::1"),
    "a token without end": tokens_by(without_end),
    "a token drop by drop": tokens_by(drop_by_drop),
    "a token of nothing": tokens_by(lambda handler: give(handler, b"[" * 5000)),
    "a token with a line": tokens_by(lambda handler: give(handler, b'{"token": "x\\r\\nHost: y"}')),
    "a token of a number": tokens_by(lambda handler: give(handler, b'{"token": 7}')),
    "a size that no disk has": blobs_after(manifest(layer(size=1 << 62)), without_end),
    "many sizes that no disk has": blobs_after(
        manifest(*(layer(f"w/{each}", b"%d" % each, 1 << 40) for each in range(1000))), without_end
    ),
    "more than it says": blobs_after(manifest(layer()), without_end),
    "more than it says at once": blobs_after(manifest(layer()), lambda handler: give(handler, bytes(50 << 20))),
    "another content": blobs_after(manifest(layer()), lambda handler: give(handler, b"WEIGHTS")),
    "the end of something": blobs_after(manifest(layer()), lambda handler: without_end(handler, 206)),
    "a blob elsewhere": blobs_after(
        manifest(layer()), lambda handler: give(handler, b"", 307, Location="//192.0.2.1/")
    ),
}


@pytest.mark.parametrize("access", [RegistryAccess(), PASSWORD], ids=["nobody", "somebody"])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_ends_and_leaves_nothing(
    attack: Callable[[Handler], None], access: RegistryAccess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmexport.release.registry._ANSWER_S", 1.0)
    began = time.monotonic()
    with serving(attack) as (host, _):
        tracemalloc.start()
        try:
            with pytest.raises(GlmexportError):
                pull(reference(host), tmp_path / "back", lambda _: None, access, Silent())
            assert tracemalloc.get_traced_memory()[1] < MOST
        finally:
            tracemalloc.stop()
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - began < 20


def test_a_part_that_is_there_does_not_let_in_more_than_is_claimed(tmp_path: Path) -> None:
    parts = tmp_path / ".back.pulling" / ".parts"
    parts.mkdir(parents=True)
    (parts / hashlib.sha256(CONTENT).hexdigest()).write_bytes(CONTENT[:3])
    answer = blobs_after(manifest(layer()), lambda handler: without_end(handler, 206))
    with serving(answer) as (host, _), pytest.raises(UnverifiedError, match=r"model\.onnx"):
        pull(reference(host), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())
    assert not list(tmp_path.iterdir())


def test_what_is_allowed_is_asked_before_anything_is_fetched(tmp_path: Path) -> None:
    answer = blobs_after(manifest(layer(), layer("more")), lambda handler: give(handler, CONTENT))
    with serving(answer) as (host, asked):
        with pytest.raises(InputError, match="14 bytes, and 13 are allowed"):
            pull(reference(host), tmp_path / "back", lambda _: None, RegistryAccess(), Silent(), 13)
        assert len(asked) == 1 and not list(tmp_path.iterdir())
        pull(reference(host), tmp_path / "back", lambda _: None, RegistryAccess(), Silent(), 14)
    assert (tmp_path / "back" / "more").read_bytes() == CONTENT


def test_no_other_host_is_told_the_password(tmp_path: Path) -> None:
    """Unless the user named it; one that has an entry of its own is told that."""
    with ExitStack() as stack:
        other, told = stack.enter_context(serving(lambda handler: give(handler, b'{"token": "t"}')))
        host, _ = stack.enter_context(serving(asking(f"http://{other}/token")))

        def refused(access: RegistryAccess, why: str) -> None:
            with pytest.raises(InputError, match=why):
                pull(reference(host), tmp_path / "back", lambda _: None, access, Silent())

        refused(PASSWORD, f"--token-host {other}")
        assert not told
        # Nobody's is asked for by nobody.
        refused(RegistryAccess(), "does not let us")
        refused(RegistryAccess("ministry", "geheim", token_hosts=frozenset({other})), "does not let us")
        refused(RegistryAccess("ministry", "geheim", others={other: ("another", "x")}), "does not let us")
        assert [who for _, who in told] == [None, "Basic bWluaXN0cnk6Z2VoZWlt", "Basic YW5vdGhlcjp4"]


@pytest.mark.parametrize("access", [PASSWORD, RegistryAccess(token="t")], ids=["password", "token"])
def test_a_redirection_does_not_take_the_password_along(access: RegistryAccess, tmp_path: Path) -> None:
    with serving(lambda handler: give(handler, manifest(layer()))) as (other, told):

        def answer(handler: Handler) -> None:
            if handler.headers.get("Authorization"):
                give(handler, b"", 307, Location=f"http://{other}/elsewhere")
            else:
                give(handler, b"", 401, WWW_Authenticate="Basic")

        with serving(answer) as (host, _), pytest.raises(GlmexportError):
            pull(reference(host), tmp_path / "back", lambda _: None, access, Silent())
    assert told[0] == ("/elsewhere", None) and not any(who for _, who in told)


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1/x", "http://registry.example.org/x", "http://localhost:80/", "ftp://127.0.0.1/"],
)
def test_what_began_with_tls_goes_on_with_tls(location: str) -> None:
    with Registry(reference("registry.example.org"), RegistryAccess()) as registry, pytest.raises(MachineError):
        registry._url(location)


def test_a_password_does_not_go_without_tls() -> None:
    access = RegistryAccess("ministry", "geheim", plain_http=True)
    with Registry(reference("registry.example.org"), access) as registry:
        registry._authorization = "Basic x"
        with pytest.raises(InputError, match="without TLS"):
            registry._signed_in(registry._url("/v2/"))
        with pytest.raises(InputError, match="without TLS"):
            registry._token(registry._url("/token"), {})


@pytest.mark.parametrize("status", [202, 401, 404, 500])
def test_an_answer_without_end_does_not_hold_a_push(status: int, signed: Path, tmp_path: Path) -> None:
    write_layout(Bundle.open(signed), tmp_path / "layout", Silent())

    def answer(handler: Handler) -> None:
        if handler.command == "HEAD":
            give(handler, b"", 404)
        else:
            without_end(handler, status, Location="/v2/upload")

    with serving(answer) as (host, _), pytest.raises((InputError, MachineError)):
        push(tmp_path / "layout", reference(host), RegistryAccess(), Silent())
