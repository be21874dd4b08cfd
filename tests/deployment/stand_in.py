"""Answers like ``glmexport serve`` what a deployment asks, without a model: many releases can be switched in seconds.

    python3 stand_in.py serve RELEASE --host HOST --port PORT
    python3 stand_in.py --version | targets probe --json

It answers golden prompts as golden.json says, unless the release's counter ends in 9.
"""

from __future__ import annotations

import http.server
import json
import os
import socket
import sys
from pathlib import Path

PROBED = {"machine": "x86_64", "host": "x86-avx2", "lacking": {"x86-avx2": [], "cuda": ["No NVIDIA GPU."]}}


def serve(release: Path, host: str, port: int) -> None:
    release = release.resolve()
    golden = json.loads((release / "golden.json").read_text("utf-8"))
    answers = {tuple(answer["prompt"]): answer["steps"] for answer in golden["answers"]}
    wrong = json.loads((release / "release.json").read_text("utf-8"))["counter"] % 10 == 9

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({"status": "ready", "directory": release.name})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            steps = answers[tuple(asked["prompt"])]
            tokens = [step["token"] for step in steps]
            ids = [[token for token, _ in step["top"]] for step in steps]
            logprobs = [[value - 9 * wrong for _, value in step["top"]] for step in steps]
            likely = {"top_token_ids": ids, "top_token_logprobs": logprobs}
            self.reply({"choices": [{"token_ids": tokens, "logprobs": likely}]})

        def reply(self, value: object) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    handed = os.environ.get("LISTEN_PID") == str(os.getpid())
    server = http.server.ThreadingHTTPServer((host, port), Handler, bind_and_activate=not handed)
    if handed:
        server.socket.close()
        server.socket = socket.socket(fileno=3)
    server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--version"]:
        print("glmexport, version 0.1.0")
    elif sys.argv[1:3] == ["targets", "probe"]:
        print(json.dumps(PROBED))
    else:
        options = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=True))
        serve(Path(sys.argv[2]), options.get("--host", "127.0.0.1"), int(options.get("--port", 0)))
