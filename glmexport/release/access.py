"""Image references, and the access to a registry: who asks for an image, and who may learn the password."""

from __future__ import annotations

import base64
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glmexport.foundation.errors import InputError
from glmexport.foundation.untrusted import SMALL, parse_object, read_regular

_REFERENCE = re.compile(
    r"(?P<host>[A-Za-z0-9.-]+(:[0-9]+)?|\[[0-9A-Fa-f:]+\](:[0-9]+)?)"
    r"/(?P<name>[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*)"
    r"(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
USER, PASSWORD, TOKEN = "GLMEXPORT_REGISTRY_USER", "GLMEXPORT_REGISTRY_PASSWORD", "GLMEXPORT_REGISTRY_TOKEN"


@dataclass(frozen=True)
class ImageReference:
    """An image in a registry: by tag, by digest, or by both, where the digest counts."""

    host: str
    name: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> ImageReference:
        """Parse a reference ``HOST[:PORT]/NAME[:TAG][@sha256:DIGEST]``.

        Raises:
            InputError: it is not so, or has neither tag nor digest.
        """
        match = _REFERENCE.fullmatch(text)
        if match is None or not (match["tag"] or match["digest"]):
            raise InputError(
                f"{text!r} names no image in a registry.",
                next_step="Write HOST[:PORT]/NAME:TAG or HOST/NAME@sha256:...",
            )
        return cls(match["host"], match["name"], match["tag"], match["digest"])

    def __str__(self) -> str:
        return f"{self.host}/{self.name}" + (f"@{self.digest}" if self.digest else f":{self.tag}")


@dataclass(frozen=True)
class RegistryAccess:
    """The access to a registry: who asks, and what vouches for the server."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    #: Certificates that vouch for the server, instead of the system's.
    authority: Path | None = None
    #: Whether HTTP without TLS is allowed beyond this machine.
    plain_http: bool = False
    #: Hosts beside the registry that may ask for its password to give tokens: ``HOST`` or ``HOST:PORT``.
    token_hosts: frozenset[str] = frozenset()
    #: User and password of other hosts, from the user's file.
    others: Mapping[str, tuple[str, str]] = field(default_factory=dict, repr=False)

    @classmethod
    def given(
        cls,
        host: str,
        authority: Path | None,
        auth_file: Path | None,
        *,
        plain_http: bool,
        token_hosts: Iterable[str] = (),
    ) -> RegistryAccess:
        """Read user and password from the environment, or from a file such as docker's config.json.

        Raises:
            InputError: the file cannot be read.
        """
        user, password, token = (os.environ.get(name) for name in (USER, PASSWORD, TOKEN))
        others: dict[str, tuple[str, str]] = {}
        if auth_file and not (user or token):
            try:
                entries = parse_object(read_regular(auth_file, SMALL.size), SMALL)["auths"]
                others = {name: _pair(entry["auth"]) for name, entry in entries.items() if "auth" in entry}
                user, password = others.pop(host, (None, None))
                token = entries.get(host, {}).get("registrytoken")
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise InputError(
                    f"{auth_file} cannot be read: {type(error).__name__}.", next_step="Give a config.json as docker's."
                ) from error
        return cls(user, password, token, authority, plain_http, frozenset(token_hosts), others)

    def pair_for(self, asker: str, registry: str) -> tuple[str, str] | None:
        """Return the user and password that ``asker``, which gives tokens for ``registry``, may learn.

        The result is None if it may learn neither.
        """
        if self.user is not None and (asker == registry or asker in self.token_hosts):
            return self.user, self.password or ""
        return self.others.get(asker)


def _pair(encoded: str) -> tuple[str, str]:
    user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    return user, password


def is_loopback(host: str) -> bool:
    """Return whether ``host``, with or without a port, is this machine."""
    name = host[1 : host.index("]")] if host.startswith("[") else host.rpartition(":")[0] or host
    if name.count(":") and not host.startswith("["):
        name = host
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
