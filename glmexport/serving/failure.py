"""Errors in the form that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.responses import JSONResponse

#: Most characters of a message; names of fields are the client's own, and may be as long as a body.
_LONGEST = 400

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ClientGone(Exception):
    """The client has gone, so that nothing is to be answered."""


@dataclass
class Refused(Exception):
    """A request is not answered. ``param``: the field that is wrong; ``code``: what programs go by."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def document(self) -> dict[str, object]:
        """The body of the response."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        param = None if self.param is None else _told(self.param)
        return {"error": {"message": _told(self.message), "type": kind, "param": param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.document, self.status, dict(self.headers))


FAILED = Refused(500, "The server failed; its log says where, at the name in X-Request-Id.")


def _told(text: str) -> str:
    """A text that can be sent: not too long, and without halves of surrogate pairs."""
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    return short.encode("utf-8", "replace").decode()
