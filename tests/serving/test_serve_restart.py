"""The end of a server: what was accepted is answered, and a socket that is handed over loses no connection."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from builds import Run
from scripted import SCRIPTS
from served import PATIENCE_S, Served, ready, start

from glmexport.bundle.manifest import list_files, read_manifest

ASKED: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hi!"}], "temperature": 0}
ENDLESS: Any = {**ASKED, "messages": [{"role": "user", "content": "Endless~"}], "stream": True}


def test_a_server_ends_in_order(bundle: Path, tmp_path: Path) -> None:
    """A running stream is finished, what was accepted is answered, and systemd is told.

    It was started by a link, as releases are; that the link names nothing any more makes no difference to it.
    """
    (tmp_path / "current").symlink_to(bundle)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(PATIENCE_S)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
        server = start(tmp_path / "current", "--name", "tiny", env=environment)
        (tmp_path / "current").unlink()
        assert _said_before(told, b"READY=1") == {b"WATCHDOG=1"}
        with server.client() as client, client.chat.completions.create(**ENDLESS, max_tokens=600) as stream:
            assert next(iter(stream)).choices[0].finish_reason is None
            # Connected, and nothing said yet.
            with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as late:
                server.process.send_signal(signal.SIGTERM)
                answer = _ask_late(late)
            assert answer.startswith("HTTP/1.1 200") and "connection: close" in answer.lower()
            assert SCRIPTS["!"] in answer
            assert list(stream)[-1].choices[0].finish_reason == "length"
            assert server.stop() == 0
            with pytest.raises(openai.APIConnectionError):
                client.models.list()
        assert _said_before(told, b"STOPPING=1") <= {b"WATCHDOG=1"}


def _said_before(told: socket.socket, last: bytes) -> set[bytes]:
    said = set()
    while (state := told.recv(100)) != last:
        said.add(state)
    return said


def _ask_late(connection: socket.socket) -> str:
    body = json.dumps(ASKED).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    connection.settimeout(PATIENCE_S)
    answer = b""
    while part := connection.recv(1 << 16):
        answer += part
    return answer.decode()


def activated(listener: socket.socket, program: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python program whose file descriptor 3 is ``listener``, as systemd starts one."""
    number = listener.fileno()
    # The process names itself, which another cannot do for it before it is there.
    prepare = f"import os, sys; os.dup2({number}, 3); os.environ |= dict(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()));"
    command = [sys.executable, "-c", prepare + program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=[number])


def serving(bundle: Path, listener: socket.socket) -> Served:
    """A server on a socket of another's, once it is ready."""
    program = "from glmexport.cli.main import main; main()"
    return ready(activated(listener, program, "serve", str(bundle), "--threads", "1", "--json", "--name", "tiny"))


def test_a_restart_refuses_no_connection(bundle: Path) -> None:
    """Clients that come all the time, each on a new connection, while one server takes the socket over from another."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        first = serving(bundle, listener)
        url, stop = first.url, threading.Event()
        answers: list[str] = []
        failures: list[Exception] = []

        def ask() -> None:
            while not stop.is_set():
                try:
                    with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
                        response = http.post("/v1/chat/completions", json=ASKED)
                        answers.append(response.json()["choices"][0]["message"]["content"])
                except Exception as error:
                    failures.append(error)

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for thread in clients:
            thread.start()
        try:
            _wait(lambda: len(answers) > 20)
            assert first.stop() == 0
            second = serving(bundle, listener)
            assert second.url == url
            count = len(answers)
            _wait(lambda: len(answers) > count + 20)
        finally:
            stop.set()
            for thread in clients:
                thread.join(PATIENCE_S)
        assert second.stop() == 0
    assert not failures and set(answers) == {SCRIPTS["!"]}


def _wait(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("listens", [False, True])
def test_what_is_handed_over(listens: bool) -> None:
    with socket.socket() as held:
        if listens:
            held.bind(("127.0.0.1", 0))
            held.listen()
        process = activated(held, "from glmexport.serving.listen import *; print(url_of(inherited_socket(os.environ)))")
        said, complained = process.communicate(timeout=PATIENCE_S)
        port = held.getsockname()[1]
    if listens:
        assert said.strip() == f"http://127.0.0.1:{port}"
    else:
        assert process.returncode and "no listening stream socket" in complained


def test_a_changed_bundle_is_not_served(bundle: Path, tmp_path: Path, run: Run) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    (copy / "chat_template.jinja").write_text("{{ 1 }}")
    outcome = run("serve", copy, "--port", 0)
    assert outcome.code == 64 and "sha256 differs" in outcome.stderr


def test_a_graph_that_cannot_be_loaded_ends_the_server(bundle: Path, tmp_path: Path, run: Run) -> None:
    """Found in the thread that loads it, when the socket listens already."""
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    (copy / "model.onnx").write_bytes(b"no graph")
    manifest = read_manifest(copy).model_copy(update={"files": list_files(copy)})
    (copy / "bundle.json").write_text(manifest.model_dump_json())
    outcome = run("serve", copy, "--port", 0, "--threads", 1)
    assert outcome.code == 64 and "cannot load" in outcome.stderr and "Traceback" not in outcome.stderr


def test_without_any_network(bundle: Path) -> None:
    """In a network of its own, where there is loopback at most."""
    isolated = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*isolated, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces here")
    program = f"""
import json, subprocess, sys, urllib.request
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
server = subprocess.Popen([sys.executable, "-m", "glmexport", "serve", {str(bundle)!r}, "--port", "0", "--threads", "1",
                           "--json"], stdout=subprocess.PIPE, text=True)
url = json.loads(server.stdout.readline())["url"]
request = urllib.request.Request(url + "/v1/chat/completions", json.dumps({ASKED | {"model": None}}).encode(),
                                 {{"Content-Type": "application/json"}})
print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
server.terminate()
sys.exit(server.wait())
"""
    done = subprocess.run(
        [*isolated, sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    if "ip" in done.stderr and "No such file" in done.stderr:
        pytest.skip("no ip command here")
    assert done.returncode == 0 and done.stdout.strip() == SCRIPTS["!"], done.stderr
