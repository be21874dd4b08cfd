"""Connections whose clients do not do their part: each has an end, and others are answered meanwhile."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from served import PATIENCE_S, Served, ready

HOST = "Host: localhost\r\n"
CHAT = f"POST /v1/chat/completions HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n"
HALF = f'{CHAT}Content-Length: 1000\r\n\r\n{{"messages": ['
#: An answer without an end, each token with as much about it as there is.
ENDLESS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Endless~"}], "max_tokens": 3900, "temperature": 0, "stream": True,
    "logprobs": True, "top_logprobs": 20,
}  # fmt: skip
#: How long a busy machine may need for what takes no time.
SOON_S = 5.0


@contextmanager
def serving(bundle: Path, log: Path, *arguments: str, files: int = 1024, **limits: float) -> Iterator[Served]:
    """A server with other limits than the command line gives, which may open so many files."""
    program = f"""
import functools, resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
import glmexport.serving.limits as limits
limits.ServingLimits = functools.partial(limits.ServingLimits, **{limits!r})
from glmexport.cli.main import main
main()
"""
    command = [sys.executable, "-c", program, "serve", str(bundle), "--port", "0", "--threads", "1", "--json"]
    with log.open("w") as stderr:
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield ready(process)
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def connect(server: Served, said: str | bytes = b"", *, buffer: int = 0) -> socket.socket:
    """A connection on which something was said; ``buffer``: bytes that it takes without being read."""
    port = httpx.URL(server.url).port
    made = socket.socket()
    if buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.settimeout(PATIENCE_S)
    made.connect(("127.0.0.1", port))
    made.sendall(said if isinstance(said, bytes) else said.encode())
    return made


def rest(connection: socket.socket) -> bytes:
    """Everything until the server ends the connection."""
    answer = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            answer += part
    return answer


def alive_s(server: Served) -> float:
    """How long the server needs to say that it is alive."""
    begun = time.monotonic()
    with server.http() as http:
        assert http.get("/healthz").status_code == 200
    return time.monotonic() - begun


def until(condition: Any, within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("length", ["Content-Length: 1000\r\n\r\n{", "Transfer-Encoding: chunked\r\n\r\n5\r\nhe"])
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (f"GET /healthz HTTP/1.1\r\n{HOST}", 200), (f"GET /v1/models HTTP/1.1\r\n{HOST}", 200),
        ("POST /healthz HTTP/1.1\r\nHost: evil.example\r\n", 403), (f"POST /nowhere HTTP/1.1\r\n{HOST}", 404),
        (f"POST /v1/models HTTP/1.1\r\n{HOST}", 405),
        (f"POST /v1/chat/completions HTTP/1.1\r\n{HOST}Content-Type: text/plain\r\n", 400),
        (f"GET /healthz HTTP/1.1\r\n{HOST}Expect: 100-continue\r\n", 200),
    ],
)  # fmt: skip
def test_a_body_that_nobody_reads_ends_the_connection(served: Served, head: str, status: int, length: str) -> None:
    with connect(served, head + length) as connection:
        begun = time.monotonic()
        answer = rest(connection).lower()
        assert answer.startswith(f"http/1.1 {status}".encode()) and answer.count(b"connection: close") == 1
        assert time.monotonic() - begun < SOON_S


def test_a_body_that_has_come_costs_no_connection(served: Served) -> None:
    asked = f"POST /nowhere HTTP/1.1\r\n{HOST}Content-Length: 2\r\n\r\n{{}}GET /healthz HTTP/1.1\r\n{HOST}\r\n"
    with connect(served, asked) as connection:
        answer = b""
        while b"alive" not in answer:
            answer += connection.recv(1 << 16)
        assert b"HTTP/1.1 404" in answer and b"close" not in answer


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", "Transfer-Encoding: chunked\r\nContent-Length: 2\r\n",
        "Content-Length: 2\r\nContent-Length: 2\r\n", "Content-Length: 2\r\nContent-Length: 3\r\n",
        "Content-Length: 2, 2\r\n", "Content-Length: +2\r\n", "Content-Length: -2\r\n", "Content-Length: 0x2\r\n",
        "Transfer-Encoding: gzip, chunked\r\n", "Transfer-Encoding: identity\r\n", "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "X: a\r\n b\r\nContent-Length: 2\r\n",
        "Content-Length: 2\r\nTransfer-Encoding:\r\n chunked\r\n", "X: a\nContent-Length: 2\r\n", "Content-Length: 2\n",
        "X: a\x00b\r\nContent-Length: 2\r\n", "Content-Length : 2\r\n", "Host: other\r\nContent-Length: 2\r\n",
        "X: a\rContent-Length: 2\r\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["POST", "HEAD"])
def test_a_request_whose_end_is_not_certain_is_refused(served: Served, method: str, head: str) -> None:
    said = f"{method} /v1/completions HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n{head}\r\n{{}}0\r\n\r\n"
    with connect(served, said) as connection:
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1
    assert method == "HEAD" or json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_a_coding_is_not_taken_from_an_old_client(served: Served) -> None:
    with connect(served, f"POST /healthz HTTP/1.0\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n") as connection:
        assert rest(connection).startswith(b"HTTP/1.1 400")


def test_a_body_in_crumbs(served: Served) -> None:
    with connect(served, f"{CHAT}Transfer-Encoding: chunked\r\n\r\n") as connection:
        with suppress(ConnectionError):
            for _ in range(50):
                connection.sendall(b"1\r\n \r\n" * 10_000)
        assert alive_s(served) < SOON_S
        assert rest(connection)[:12] in (b"HTTP/1.1 400", b"")


@pytest.mark.parametrize("pause_s", [0.02, 100])
def test_a_body_that_comes_too_slowly(bundle: Path, tmp_path: Path, pause_s: float) -> None:
    """A byte now and then, and none at all."""
    with serving(bundle, tmp_path / "log", body_pause_s=0.5, body_s=2) as server, connect(server, HALF) as connection:
        begun = time.monotonic()
        connection.settimeout(pause_s)
        answer = b""
        while time.monotonic() - begun < 2 * SOON_S:
            try:
                answer = connection.recv(1 << 16)
                break
            except TimeoutError:
                connection.sendall(b" ")
        connection.settimeout(PATIENCE_S)
        assert answer.startswith(b"HTTP/1.1 408") and rest(connection)[-1:] in (b"", b"}")
        assert time.monotonic() - begun < 0.5 + SOON_S


@pytest.mark.parametrize("kind", ["stream", "answers in a row"])
def test_a_client_that_never_reads(bundle: Path, tmp_path: Path, kind: str) -> None:
    body = json.dumps(ENDLESS)
    said = f"{CHAT}Content-Length: {len(body)}\r\n\r\n{body}"
    if kind != "stream":
        said = f"GET /metrics HTTP/1.1\r\n{HOST}\r\n" * 2000
    with serving(bundle, tmp_path / "log", send_s=0.3, bytes_per_s=1 << 20) as server:
        assert alive_s(server) < SOON_S
        process = psutil.Process(server.process.pid)
        with connect(server, said, buffer=2048) as connection:
            port = connection.getsockname()[1]

            def held() -> bool:
                return any(other.raddr and other.raddr.port == port for other in process.net_connections("tcp"))

            until(held)
            until(lambda: not held())
            assert alive_s(server) < SOON_S
        until(lambda: server.metric("glmexport_running") == 0)
    assert not (tmp_path / "log").read_text().count("Traceback")


@pytest.mark.parametrize(
    "said",
    [
        "", "GET /healthz HT", f"GET /healthz HTTP/1.1\r\n{HOST}\r\n",
        f"GET /healthz HTTP/1.1\r\n{HOST}Content-Length: 9\r\n\r\n", HALF,
    ],
    ids=["silent", "half a head", "answered", "unread body", "half a body"],
)  # fmt: skip
def test_more_connections_than_files(bundle: Path, tmp_path: Path, said: str) -> None:
    with serving(bundle, tmp_path / "log", files=256) as server:
        held = []
        for _ in range(245):
            with suppress(ConnectionError):
                held.append(connect(server, said))
        assert alive_s(server) < SOON_S
        assert psutil.Process(server.process.pid).num_fds() < 256
        for connection in held:
            connection.close()
        assert alive_s(server) < SOON_S
        assert server.stop() == 0
    assert (tmp_path / "log").read_text().count("\n") < 20


def test_more_requests_than_connections(bundle: Path, tmp_path: Path) -> None:
    """However many may wait, some connections are left as soon as each request is refused or waits."""
    body = json.dumps({**ENDLESS, "stream": False})
    said = f"{CHAT}Content-Length: {len(body)}\r\n\r\n{body}"
    with serving(bundle, tmp_path / "log", "--max-queue", "64", files=96) as server:
        held = []

        def alive() -> bool:
            with suppress(httpx.TransportError, AssertionError):
                return alive_s(server) < SOON_S
            return False

        for _ in range(60):
            with suppress(ConnectionError):
                held.append(connect(server, said))
        until(alive, 4 * SOON_S)
        until(lambda: server.metric("glmexport_waiting") > 0)
        for connection in held:
            connection.close()


def test_no_file_is_left(bundle: Path, tmp_path: Path) -> None:
    """Not even for one more connection: nothing is logged in a loop, and once there are files again, it goes on."""
    with serving(bundle, tmp_path / "log") as server:
        process = psutil.Process(server.process.pid)
        assert alive_s(server) < SOON_S
        limits = process.rlimit(psutil.RLIMIT_NOFILE)
        process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds(), limits[1]))
        before = sum(process.cpu_times()[:2])
        with connect(server, f"GET /healthz HTTP/1.1\r\n{HOST}\r\n") as connection:
            time.sleep(1)
            assert sum(process.cpu_times()[:2]) - before < 0.5
            process.rlimit(psutil.RLIMIT_NOFILE, limits)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert (tmp_path / "log").read_text().count("\n") < 20


def test_a_process_that_may_open_too_few_files(bundle: Path) -> None:
    """In a process of its own, as this one may have as many open already."""
    command = ["sh", "-c", 'ulimit -n 79; exec "$@"', "sh", sys.executable, "-m", "glmexport", "serve"]
    done = subprocess.run([*command, bundle, "--port", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 69 and "ulimit -n" in done.stderr


def test_it_ends_though_clients_are_silent(bundle: Path, tmp_path: Path) -> None:
    """Long before answers that run would have to end: there are none."""
    with serving(bundle, tmp_path / "log", "--drain-s", "60") as server:
        said = ("", "GET /", HALF, HALF.replace("1000", "2000"), f"GET /healthz HTTP/1.1\r\n{HOST}\r\n")
        held = [connect(server, text) for text in said]
        assert alive_s(server) < SOON_S
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 4 + SOON_S
        for connection in held:
            connection.close()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_it_ends_though_clients_go_on_and_on(bundle: Path, tmp_path: Path) -> None:
    """A body that comes byte by byte, and an answer that is taken byte by byte."""
    body = json.dumps(ENDLESS)
    with serving(bundle, tmp_path / "log", "--drain-s", "1", body_pause_s=100, body_s=100) as server:
        slow = connect(server, HALF)
        reading = connect(server, f"{CHAT}Content-Length: {len(body)}\r\n\r\n{body}", buffer=2048)
        reading.recv(1)
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        while server.process.poll() is None:
            with suppress(OSError):
                slow.sendall(b" ")
                reading.recv(1)
            assert time.monotonic() - begun < 1 + 2 + SOON_S
            time.sleep(0.05)
        assert server.process.returncode == 0
        slow.close()
        reading.close()
    assert "Traceback" not in (tmp_path / "log").read_text()
