"""How much one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one request, and of one connection."""

    body_bytes: int = 4 << 20
    #: Levels of arrays and objects within each other.
    depth: int = 64
    messages: int = 4096
    tools: int = 128
    stops: int = 16
    stop_characters: int = 256
    top_logprobs: int = 20
    #: Of an answer; also what is taken where a request says nothing.
    answer_tokens: int = 4096
    #: Until the head of a request is there, and then its body.
    head_s: float = 10
    body_s: float = 30
    #: Until a client takes what is sent to it.
    send_s: float = 60
    #: Between two requests on a connection.
    idle_s: float = 30
