"""Through a real registry and back, over real sockets; what it does to a release is noticed."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jwt
import pytest
from builds import Run
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from signatures import COUNTER, Judge, Pair, openssl, pair, sha256, sign_with, tree

from glmexport.bundle.bundle import Bundle
from glmexport.foundation.errors import EXIT_INPUT, EXIT_UNVERIFIED, InputError, MachineError, UnverifiedError
from glmexport.foundation.progress import Silent
from glmexport.release.access import ImageReference, RegistryAccess, is_loopback
from glmexport.release.layout import read_layout, write_layout
from glmexport.release.transfer import pull, push
from glmexport.release.verification import verify

PROGRAM = shutil.which("docker-registry")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="docker-registry is not installed (Debian: docker-registry)")
#: bcrypt of "geheim".
PASSWORDS = "ministry:$2b$04$gE8zjLraY/dwhQbcjy9QN.afmJOgGk.cpoWZxCz4Agoi2TdB6jqJC"


@dataclass
class Server:
    """A registry at ``host``, its storage and its log."""

    host: str
    storage: Path
    log: Path

    def requests(self, method: str) -> list[str]:
        """What was asked so, from the log of the registry."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if f'"{method} /v2/' in line]

    def blob(self, digest: str) -> Path:
        """Where it keeps a blob."""
        hexadecimal = digest.partition(":")[2]
        return self.storage / "docker/registry/v2/blobs/sha256" / hexadecimal[:2] / hexadecimal / "data"


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


@contextmanager
def serving(directory: Path, more: str = "", http: str = "") -> Iterator[Server]:
    """docker-registry on a free port of this machine."""
    port = free_port()
    server = Server(f"127.0.0.1:{port}", directory / "storage", directory / "log")
    settings = directory / "config.yml"
    settings.write_text(
        f"version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: {server.storage}\n"
        f"  delete:\n    enabled: true\nhttp:\n  addr: 127.0.0.1:{port}\n  secret: s\n{http}{more}"
    )
    assert PROGRAM
    with server.log.open("wb") as log:
        process = subprocess.Popen([PROGRAM, "serve", str(settings)], stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(port, process)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert process.poll() is None
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail("docker-registry does not start")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Without passwords."""
    (tmp_path / "registry").mkdir()
    with serving(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def layout(signed: Path, tmp_path: Path) -> Path:
    """An image layout of the signed bundle."""
    write_layout(Bundle.open(signed), tmp_path / "layout", Silent())
    return tmp_path / "layout"


def image(host: str, tag: str = "r7") -> ImageReference:
    return ImageReference.parse(f"{host}/models/glm:{tag}")


def at_digest(host: str, digest: str) -> ImageReference:
    return ImageReference.parse(f"{host}/models/glm@{digest}")


def test_a_release_goes_through_a_registry(
    server: Server, layout: Path, signed: Path, tmp_path: Path, keys: Pair
) -> None:
    pushed = push(layout, image(server.host), RegistryAccess(), Silent())
    assert pushed.digest == read_layout(layout)[0] and set(pushed.sent) == {*tree(signed), "(configuration)"}

    def check(bundle: Path) -> object:
        return verify(bundle, keys.public, newer_than=COUNTER - 1)

    for number, reference in enumerate((at_digest(server.host, pushed.digest), image(server.host))):
        assert pull(reference, tmp_path / f"back{number}", check, RegistryAccess(), Silent()) == pushed.digest
        assert tree(tmp_path / f"back{number}") == tree(signed)
    assert not list(tmp_path.glob(".*"))


def test_a_blob_goes_in_chunks(
    server: Server, layout: Path, signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmexport.release.registry._CHUNK", 7000)
    pushed = push(layout, image(server.host), RegistryAccess(), Silent())
    sizes = [path.stat().st_size for path in (layout / "blobs" / "sha256").iterdir() if path.name != pushed.digest[7:]]
    assert len(server.requests("PATCH")) == sum(-(-size // 7000) for size in sizes) > len(sizes)
    pull(at_digest(server.host, pushed.digest), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())
    assert tree(tmp_path / "back") == tree(signed)


def changed_block(bundle: Path, key: Path) -> None:
    """A later release: one block has other weights."""
    block = bundle / "weights" / "block_001.data"
    block.write_bytes(bytes(reversed(block.read_bytes())))
    table = json.loads((bundle / "bundle.json").read_bytes())
    for entry in table["files"]:
        if entry["path"] == "weights/block_001.data":
            entry["sha256"] = sha256(block)
    (bundle / "bundle.json").write_text(json.dumps(table))
    for name in ("report.json", "model.sig"):
        (bundle / name).unlink()
    sign_with(bundle, key, counter=COUNTER + 1)


def test_a_second_push_sends_what_changed(
    server: Server, layout: Path, release: Path, tmp_path: Path, keys: Pair
) -> None:
    first = push(layout, image(server.host), RegistryAccess(), Silent())
    sent = len(server.requests("PATCH"))
    assert sent == len(first.sent) and not first.present
    again = push(layout, image(server.host), RegistryAccess(), Silent())
    assert not again.sent and len(server.requests("PATCH")) == sent
    changed_block(release, keys.private)
    write_layout(Bundle.open(release), tmp_path / "later", Silent())
    second = push(tmp_path / "later", image(server.host, "r8"), RegistryAccess(), Silent())
    assert set(second.sent) == {
        "(configuration)", "weights/block_001.data", "bundle.json", "release.json", "model.sig",
        "attestations/provenance.json", "attestations/ml-bom.json",
    }  # fmt: skip
    assert len(server.requests("PATCH")) - sent == len(second.sent)
    assert {"model.onnx", "weights/block_000.data"} <= set(second.present)


def test_a_blob_that_the_registry_changed_is_named(server: Server, layout: Path, tmp_path: Path, signed: Path) -> None:
    digest = push(layout, image(server.host), RegistryAccess(), Silent()).digest
    _, _, manifest = read_layout(layout)
    for name in ("weights/block_000.data", "model.sig", "chat_template.jinja"):
        path = server.blob(next(layer.digest for layer in manifest.layers if layer.name == name))
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UnverifiedError, match=name):
            pull(at_digest(server.host, digest), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())
        assert not (tmp_path / "back").exists()
        path.write_bytes(content)
        assert not (tmp_path / ".back.pulling").exists()
    pull(at_digest(server.host, digest), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())
    assert tree(tmp_path / "back") == tree(signed)


def test_a_manifest_that_the_registry_changed_is_refused(server: Server, layout: Path, tmp_path: Path) -> None:
    digest = push(layout, image(server.host), RegistryAccess(), Silent()).digest
    path = server.blob(digest)
    path.write_bytes(path.read_bytes().replace(b"model.onnx", b"model.0nnx"))
    with pytest.raises((UnverifiedError, InputError, MachineError)):
        pull(at_digest(server.host, digest), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())
    assert not (tmp_path / "back").exists()


def test_a_damaged_layout_is_not_pushed(server: Server, layout: Path, tmp_path: Path) -> None:
    _, _, manifest = read_layout(layout)
    layer = next(layer for layer in manifest.layers if layer.name == "model.onnx")
    path = layout / "blobs" / "sha256" / layer.hex
    path.write_bytes(bytes(reversed(path.read_bytes())))
    with pytest.raises(UnverifiedError, match=r"model\.onnx"):
        push(layout, image(server.host), RegistryAccess(), Silent())
    assert not server.blob(layer.digest).exists()
    with pytest.raises(InputError, match="does not have"):
        pull(image(server.host), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())


class _Cutting(socketserver.BaseRequestHandler):
    """Between a client and a registry: breaks off ``cuts`` times, after ``after`` bytes of a connection.

    Without a number of ``cuts``, after as many of all connections, for ever.
    """

    def handle(self) -> None:
        state = self.server.state  # type: ignore[attr-defined]
        with socket.create_connection(state["behind"]) as behind:
            threading.Thread(target=self._forward, args=(behind,), daemon=True).start()
            passed = 0
            while chunk := behind.recv(1024):
                passed += len(chunk)
                state["passed"] += len(chunk)
                if state["cuts"] is None and state["passed"] > state["after"]:
                    break
                if state["cuts"] and passed > state["after"]:
                    state["cuts"] -= 1
                    break
                try:
                    self.request.sendall(chunk)
                except OSError:
                    break
        with contextlib.suppress(OSError):
            # A close alone would wait for the thread that reads.
            self.request.shutdown(socket.SHUT_RDWR)

    def _forward(self, behind: socket.socket) -> None:
        try:
            while chunk := self.request.recv(65536):
                behind.sendall(chunk)
        except OSError:
            pass


@contextmanager
def cutting(host: str, after: int, cuts: int | None) -> Iterator[str]:
    name, _, port = host.partition(":")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        state = {"behind": (name, int(port)), "after": after, "cuts": cuts, "passed": 0}  # noqa: RUF012

    with Server(("127.0.0.1", 0), _Cutting) as between:
        threading.Thread(target=between.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{between.server_address[1]}"
        between.shutdown()


def test_a_download_goes_on_where_it_broke_off(server: Server, layout: Path, signed: Path, tmp_path: Path) -> None:
    digest = push(layout, image(server.host), RegistryAccess(), Silent()).digest
    with cutting(server.host, after=9000, cuts=4) as host:
        pull(at_digest(host, digest), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())
    assert tree(tmp_path / "back") == tree(signed)
    assert any(" 206 " in line for line in server.requests("GET"))


def test_a_pull_that_failed_is_taken_up(server: Server, layout: Path, signed: Path, tmp_path: Path) -> None:
    digest = push(layout, image(server.host), RegistryAccess(), Silent()).digest
    with cutting(server.host, after=120_000, cuts=None) as host, pytest.raises(MachineError, match="it goes on"):
        pull(at_digest(host, digest), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())
    assert not (tmp_path / "back").exists()
    kept = {path.name for path in (tmp_path / ".back.pulling").iterdir()} - {".parts"}
    assert kept
    before = len(server.requests("GET"))
    # Of another release, something that is not in this one.
    (tmp_path / ".back.pulling" / "left over").write_bytes(b"x")
    pull(at_digest(server.host, digest), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())
    assert tree(tmp_path / "back") == tree(signed)
    assert len(server.requests("GET")) - before <= len(tree(signed)) + 1 - len(kept & set(tree(signed)))


def test_a_link_in_place_of_what_a_pull_left_is_refused(server: Server, layout: Path, tmp_path: Path) -> None:
    push(layout, image(server.host), RegistryAccess(), Silent())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".back.pulling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link"):
        pull(image(server.host), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_does_not_verify_does_not_arrive(server: Server, layout: Path, tmp_path: Path, keys: Pair) -> None:
    digest = push(layout, image(server.host), RegistryAccess(), Silent()).digest

    def check(bundle: Path) -> object:
        return verify(bundle, keys.public, newer_than=COUNTER)

    with pytest.raises(UnverifiedError, match="counter"):
        pull(at_digest(server.host, digest), tmp_path / "back", check, RegistryAccess(), Silent())
    assert not (tmp_path / "back").exists()


def test_passwords(layout: Path, tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "passwords").write_text(PASSWORDS + "\n")
    basic = f"auth:\n  htpasswd:\n    realm: models\n    path: {tmp_path / 'passwords'}\n"
    with serving(tmp_path / "registry", basic) as server:
        for access in (RegistryAccess(), RegistryAccess("ministry", "falsch"), RegistryAccess(token="x")):
            with pytest.raises(InputError, match="does not let us"):
                push(layout, image(server.host), access, Silent())
        assert push(layout, image(server.host), RegistryAccess("ministry", "geheim"), Silent()).sent
        file = tmp_path / "config.json"
        auth = base64.b64encode(b"ministry:geheim").decode()
        file.write_text(json.dumps({"auths": {server.host: {"auth": auth}}}))
        access = RegistryAccess.given(server.host, None, file, plain_http=False)
        assert not push(layout, image(server.host), access, Silent()).sent
        assert "geheim" not in repr(access)
        file.write_text("[]")
        with pytest.raises(InputError, match=r"config\.json"):
            RegistryAccess.given(server.host, None, file, plain_http=False)


def token_service(key: Pair, certificate: Path) -> type[BaseHTTPRequestHandler]:
    """What gives tokens to who has the password."""
    private = load_pem_private_key(key.private.read_bytes(), None)
    der = x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(Encoding.DER)

    class Tokens(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            expected = "Basic " + base64.b64encode(b"ministry:geheim").decode()
            if self.headers.get("Authorization") != expected:
                self.send_response(401)
                self.end_headers()
                return
            now = int(time.time())
            kind, name, actions = query["scope"][0].split(":")
            access = [{"type": kind, "name": name, "actions": actions.split(",")}]
            claims = {
                "iss": "tokens", "sub": "ministry", "aud": query["service"][0], "exp": now + 60, "nbf": now - 60,
                "iat": now, "jti": str(now), "access": access,
            }  # fmt: skip
            header = {"x5c": [base64.b64encode(der).decode()]}
            token = jwt.encode(claims, private, "ES256", header)  # type: ignore[arg-type]
            content = json.dumps({"token": token}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Tokens


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_tokens(layout: Path, tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    key = pair(tmp_path, "tokens")
    certificate = tmp_path / "tokens.crt"
    openssl("req", "-x509", "-new", "-key", key.private, "-subj", "/CN=tokens", "-days", "2", "-out", certificate)
    with answering(token_service(key, certificate)) as host:
        bearer = (
            f"auth:\n  token:\n    realm: http://{host}/token\n    service: models\n    issuer: tokens\n"
            f"    rootcertbundle: {certificate}\n"
        )
        with serving(tmp_path / "registry", bearer) as server:
            named = RegistryAccess("ministry", "geheim", token_hosts=frozenset({host}))
            digest = push(layout, image(server.host), named, Silent()).digest
            with pytest.raises(InputError, match=f"--token-host {host}"):
                push(layout, image(server.host), RegistryAccess("ministry", "geheim"), Silent())
            for access in (RegistryAccess(), RegistryAccess("ministry", "falsch", token_hosts=named.token_hosts)):
                with pytest.raises(InputError, match="does not let us"):
                    pull(at_digest(server.host, digest), tmp_path / "back", lambda _: None, access, Silent())
            pull(
                at_digest(server.host, digest),
                tmp_path / "back",
                lambda _: None,
                named,
                Silent(),
            )


def test_tls_with_an_authority_of_one_s_own(layout: Path, tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    key = pair(tmp_path, "tls")
    certificate = tmp_path / "tls.crt"
    made = ["req", "-x509", "-new", "-key", key.private, "-subj", "/CN=registry", "-days", "2", "-out", certificate]
    openssl(*made, "-addext", "subjectAltName=IP:127.0.0.1")
    tls = f"  tls:\n    certificate: {certificate}\n    key: {key.private}\n"
    with serving(tmp_path / "registry", http=tls) as server:
        assert push(layout, image(server.host), RegistryAccess(authority=certificate), Silent()).sent
        other = tmp_path / "other.crt"
        made[-1] = other
        openssl(*made, "-addext", "subjectAltName=IP:127.0.0.1")
        with pytest.raises(MachineError, match="cannot be reached"):
            push(layout, image(server.host), RegistryAccess(authority=other), Silent())
        with pytest.raises(InputError, match="certificates"):
            push(layout, image(server.host), RegistryAccess(authority=tmp_path / "nowhere"), Silent())
        with pytest.raises(InputError, match="certificates"):
            push(layout, image(server.host), RegistryAccess(authority=key.public), Silent())


def moving(status: int, location: str) -> type[BaseHTTPRequestHandler]:
    class Moving(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Location", location)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Moving


@pytest.mark.parametrize("location", ["http://192.0.2.1/x", "file:///etc/passwd", "ftp://192.0.2.1/"])
def test_a_registry_cannot_send_us_where_nothing_is_encrypted(location: str, tmp_path: Path) -> None:
    with answering(moving(307, location)) as host, pytest.raises(MachineError, match="not encrypted"):
        pull(image(host), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())


def test_a_registry_that_is_not_there(layout: Path, tmp_path: Path) -> None:
    host = f"127.0.0.1:{free_port()}"
    with pytest.raises(MachineError, match="cannot be reached"):
        push(layout, image(host), RegistryAccess(), Silent())
    with pytest.raises(MachineError, match="cannot be reached"):
        pull(image(host), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())
    with answering(moving(307, "/again")) as host, pytest.raises(MachineError, match="307"):
        pull(image(host), tmp_path / "back", lambda _: None, RegistryAccess(), Silent())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "host/name",
        "host/Name:tag",
        "host/../x:tag",
        "http://host/x:tag",
        "host/x@sha256:0",
        "h/x:t@md5:0",
        "h/x:a b",
    ],
)
def test_what_names_no_image(text: str) -> None:
    with pytest.raises(InputError, match="names no image"):
        ImageReference.parse(text)


@pytest.mark.parametrize(
    "host,here",
    [
        ("127.0.0.1:5000", True), ("127.8.8.8", True), ("localhost:5000", True), ("localhost", True),
        ("[::1]:5000", True), ("::1", True), ("127.0.0.1.example.org", False),
        ("localhost.example.org:80", False), ("10.0.0.1", False),
        ("registry:5000", False), ("0.0.0.0", False), ("[2001:db8::1]:5000", False), ("2130706433", False),
    ],
)  # fmt: skip
def test_which_hosts_are_this_machine(host: str, here: bool) -> None:
    assert is_loopback(host) == here


def test_the_command_line(run: Run, server: Server, layout: Path, tmp_path: Path, keys: Pair, outcome: Judge) -> None:
    told = run("push", layout, f"{server.host}/models/glm:r7", "--json")
    assert told.code == 0 and told.document["sent_bytes"] > 0
    digest = told.document["digest"]
    back = tmp_path / "back"
    assert run("pull", f"{server.host}/models/glm:r7", "-o", back).code == EXIT_INPUT
    told = run("pull", f"{server.host}/models/glm@{digest}", "-o", back, "--key", keys.public, "--json")
    assert told.code == 0 and told.document["image"] == digest and outcome(back).code == 0
    other = pair(tmp_path, "other").public
    told = run("pull", f"{server.host}/models/glm:r7", "-o", tmp_path / "x", "--key", other)
    assert told.code == EXIT_UNVERIFIED and not (tmp_path / "x").exists()
    assert run("push", layout, f"{server.host}/models/glm@{digest}").code == EXIT_INPUT
    assert run("pull", f"{server.host}/models/other:r7", "-o", tmp_path / "y", "--key", keys.public).code == EXIT_INPUT
