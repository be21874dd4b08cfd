"""The server that a browser reads a job from: nobody else gets anything, and nothing else is to be had."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from glmexport.devices.page_server import PageServer, serving


def receive(name: str, body: bytes) -> bytes:
    if body == b"wrong":
        raise ValueError("That is wrong.")
    return name.encode() + b"=" + body


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "a.js").write_text("1;", encoding="utf-8")
    resources = {"page.html": b"<p>", "job/a.js": tmp_path / "job" / "a.js"}
    with serving(resources, {"event": 5}, receive) as running:
        yield running


def ask(server: PageServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str):
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)) as connection:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.read(), response.headers


def test_what_is_listed_is_served(server: PageServer) -> None:
    status, body, headers = ask(server, f"/{server.token}/job/a.js")
    assert (status, body, headers["Content-Type"]) == (200, b"1;", "text/javascript")
    # What a page needs for threads, and what keeps it from everything that is not here.
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert ask(server, f"/{server.token}/page.html")[1] == b"<p>"


@pytest.mark.parametrize("path", ["/", "/page.html", "/x/page.html", "//page.html", "/%00/page.html", "/é/page.html"])
def test_without_the_token_nothing(server: PageServer, path: str) -> None:
    for method in ("GET", "POST"):
        status, body, _ = ask(server, path.replace("é", "%C3%A9"), method, b"x" if method == "POST" else None)
        assert (status, body) == (403, b"This is not for you.")


def test_under_another_name_nothing(server: PageServer) -> None:
    """Where somebody's name server has his page's name point here."""
    assert ask(server, f"/{server.token}/page.html", Host="example.org")[0] == 403


@pytest.mark.parametrize(
    "path", ["../secret", "job/../secret", "job/%2e%2e/%2e%2e/secret", "job//a.js", "job/", "..%2fsecret", "event"]
)
def test_no_path_leads_out(server: PageServer, path: str) -> None:
    status, body, _ = ask(server, f"/{server.token}/{path}")
    assert status == 404 and body.endswith(b" here.")


def test_posts(server: PageServer) -> None:
    event = f"/{server.token}/event"
    assert ask(server, event, "POST", b"12345")[:2] == (200, b"event=12345")
    assert ask(server, event, "POST", b"wrong")[:2] == (400, b"That is wrong.")
    assert ask(server, event, "POST", b"123456")[0] == 413
    assert ask(server, f"/{server.token}/page.html", "POST", b"1")[0] == 404
    for length in ("", "-1", "1e3", "0x2"):
        assert ask(server, event, "POST", None, Content_Length=length)[0] == 411


def test_it_listens_on_the_loopback_address_and_ends(server: PageServer, tmp_path: Path) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with serving({}, {}, receive) as other:
        assert other.token != server.token
        port = other.server_port
    late = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with closing(late), pytest.raises(ConnectionRefusedError):
        late.request("GET", "/")
