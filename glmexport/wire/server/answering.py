"""Checks of a server of ours: readiness, and golden prompts."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmexport.foundation.untrusted import DocumentLimits, parse, read_regular
from glmexport.release.golden_answers import difference

#: Seconds between looks, for a connection, and for one answer.
_LOOK_S, _CONNECT_S, _ANSWER_S = 0.1, 5, 600
#: Most bytes that are read of an answer.
_MOST = 1 << 24
_LIMITS = DocumentLimits(size=_MOST, values=200_000)


class Endpoint:
    """A server on this machine. ``key``: the file of its API key, of which the first line counts."""

    def __init__(self, host: str, port: int, key: str | None) -> None:
        self.host, self.port, self._key = host, port, key

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        """Send a request, and return status and JSON of the answer.

        Raises:
            OSError: no connection, or none any more.
            ValueError: no JSON.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_ANSWER_S if body else _CONNECT_S)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = "Bearer " + Path(self._key).read_text("utf-8").split("\n")[0].strip()
        try:
            content = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, content, headers)
            answer = connection.getresponse()
            return answer.status, parse(answer.read(_MOST), _LIMITS)
        except http.client.HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()


def wait_until_ready(endpoint: Endpoint, release: str, seconds: float, alive: Callable[[], str | None]) -> str | None:
    """Wait until the server is ready with the folder of that name; return None, or why it is not.

    ``alive`` says why the server is gone, and None while it is not.
    """
    said, until = "it does not listen", time.monotonic() + seconds
    while time.monotonic() < until:
        gone = alive()
        if gone:
            return gone
        try:
            status, answer = endpoint.ask("/readyz")
            # While servers change, it may be the former one that answers.
            if status == 200 and answer.get("directory") == release:
                return None
            said = f"it answers {status} {json.dumps(answer)[:200]}"
        except (OSError, ValueError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
        time.sleep(_LOOK_S)
    return f"The server was not ready after {seconds:.0f} s: {said}."


def check_golden(endpoint: Endpoint, release: Path, tolerance: float, tell: Callable[[int, int], None]) -> str | None:
    """Ask every golden prompt of a release; return None, or what is wrong with an answer."""
    path = release / "golden.json"
    if not path.is_file():
        return None
    # Of a release that was verified.
    answers = parse(read_regular(path, _LIMITS.size), _LIMITS)["answers"]
    for number, expected in enumerate(answers, 1):
        request = {
            "prompt": expected["prompt"], "max_tokens": len(expected["steps"]), "temperature": 0,
            "logprobs": 5, "return_token_ids": True,
        }  # fmt: skip
        try:
            status, answer = endpoint.ask("/v1/completions", request)
            if status != 200:
                return f"Golden prompt {number} was answered with {status}: {json.dumps(answer)[:300]}."
            wrong = difference(expected, *_steps(answer), tolerance)
        except (OSError, ValueError, LookupError, TypeError) as error:
            return f"Golden prompt {number} was not answered: {type(error).__name__}: {error}."
        if wrong:
            return f"Golden prompt {number}: {wrong}"
        tell(number, len(answers))
    return None


def _steps(answer: Any) -> tuple[list[int], list[dict[int, float]]]:
    """Token ids, and the log-probabilities of the likeliest ones of every step by token id."""
    choice = answer["choices"][0]
    likely = choice["logprobs"]
    tops = zip(likely["top_token_ids"], likely["top_token_logprobs"])
    return choice["token_ids"], [dict(zip(tokens, values)) for tokens, values in tops]
