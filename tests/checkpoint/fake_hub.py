"""The hub's cache laid out by hand, and a hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from checkpoint_builders import write_checkpoint
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no way out of this machine."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder


def fill_cache(cache: Path, repository: str = "models--acme--tiny") -> Path:
    """A repository in the layout of the hub's library: links to blobs, one on through the shared store."""
    written = write_checkpoint(cache / "written")
    snapshot = cache / repository / "snapshots" / COMMIT
    blobs = cache / repository / "blobs"
    shared = cache / "blobs" / "ab"
    for folder in (snapshot, blobs, shared, cache / repository / "refs"):
        folder.mkdir(parents=True)
    (cache / repository / "refs" / "main").write_text(COMMIT)
    for path in list(written.iterdir()):
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix == ".safetensors":
            path.rename(shared / blob)
            (blobs / blob).symlink_to(f"../../blobs/ab/{blob}")
        else:
            path.rename(blobs / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    written.rmdir()
    return snapshot


class FakeHub(ThreadingHTTPServer):
    """The three calls of a snapshot download: revision, tree, and files by HEAD and GET."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubCalls)
        self.files = files
        self.seen: list[str] = []
        self.user_agents: set[str] = set()
        self.refusal: tuple[int, str] | None = None


class FakeHubCalls(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        self.server.user_agents.add(self.headers["User-Agent"])
        path, _, _ = self.path.partition("?")
        if self.server.refusal is not None:
            status, code = self.server.refusal
            return self.answer(status, b"{}", {"X-Error-Code": code})
        if path.startswith("/api/models/acme/tiny/revision/"):
            if path.rpartition("/")[2] not in ("main", "v1", COMMIT):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.answer(200, json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": []}).encode())
        if path == f"/api/models/acme/tiny/tree/{COMMIT}":
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": self.oid(data)}
                for name, data in self.server.files.items()
            ]
            return self.answer(200, json.dumps(rows).encode())
        name = path.removeprefix(f"/acme/tiny/resolve/{COMMIT}/")
        if name in self.server.files:
            data = self.server.files[name]
            return self.answer(200, data, {"ETag": f'"{self.oid(data)}"', "X-Repo-Commit": COMMIT})
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def oid(self, data: bytes) -> str:
        return hashlib.sha1(data).hexdigest()

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    written = write_checkpoint(tmp_path / "written")
    files = {path.name: path.read_bytes() for path in written.iterdir()}
    files |= {
        "modeling.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "chat_template.jinja": b"{{ 1 }}",
    }
    server = FakeHub(files)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()
