"""Limits of one request and of one connection."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingLimits:
    """Limits of one request, and of one connection."""

    body_bytes: int = 4 << 20
    #: Bytes of all bodies that are not read yet.
    bodies_bytes: int = 64 << 20
    #: Levels of arrays and objects within each other, and all values in them but the token ids of a prompt.
    depth: int = 64
    values: int = 1 << 16
    #: Token ids of a prompt; a server sets it to the length of the context.
    prompt_ids: int = 1 << 20
    messages: int = 4096
    tools: int = 128
    stops: int = 16
    stop_characters: int = 256
    top_logprobs: int = 20
    #: Tokens of an answer; also what is taken where a request says nothing.
    answer_tokens: int = 4096
    #: Seconds until the head of a request is there, and then its body.
    head_s: float = 10
    body_s: float = 30
    #: Bytes a second, on average, that a body brings beyond its first seconds, and that a client takes of an answer.
    bytes_per_s: int = 4 << 10
    body_pause_s: float = 5
    #: Parts of a body whose length is not given.
    chunks: int = 1 << 14
    #: Connections at a time; fewer where the process may open fewer files.
    connections: int = 512
    #: Seconds for which a client may be slow with an answer, beside the time that its size takes.
    send_s: float = 60
    #: Seconds between two requests on a connection.
    idle_s: float = 30
