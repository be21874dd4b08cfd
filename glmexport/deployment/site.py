"""A site: the servers that serve one model, how each is reached, and whom they trust."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from glmexport.foundation.definition import Definition, read_toml
from glmexport.foundation.errors import DefinitionError, InputError
from glmexport.wire.server.layout import SUBJECT
from glmexport.wire.ssh import SshAddress, parse_address

#: The unit that ``glmexport deploy --install-unit`` writes.
UNIT = "glmexport"
_PATH = re.compile(r"[A-Za-z0-9/._~][^\\]*")


class Server(Definition):
    """One server of a site, as its file describes it."""

    #: ``ssh://user@host`` or ``ssh://user@host:port``.
    at: str
    #: Private key, and the file with the server's host key; relative to the site's file.
    key: Path | None = None
    known_hosts: Path = Path("~/.ssh/known_hosts")
    #: The directory on the server that everything is kept below.
    root: str = "/srv/glmexport"
    #: A Python of the server's, 3.9 or later; no package is needed.
    python: str = "python3"
    #: The program that serves, in an environment of its own.
    glmexport: str = "/opt/glmexport/bin/glmexport"
    #: Further arguments of ``glmexport serve``.
    serve_options: tuple[str, ...] = ()
    #: The address that the server listens at, and networks that may come to it beside the server itself.
    listen: str = "127.0.0.1"
    allow: tuple[str, ...] = ()
    port: int = Field(default=8000, ge=1, le=65535)
    #: The port at which a release is asked before it serves, beside the present one; None: there is no memory for both.
    smoke_port: int | None = Field(default=None, ge=1, le=65535)
    #: The file of the API key on the server, where serving wants one.
    api_key_file: str | None = None
    #: The command that has the server begin with ``current``.
    restart: tuple[str, ...] = ("systemctl", "restart", UNIT)
    #: Seconds until a release must be ready.
    ready_s: float = Field(default=300, gt=0, allow_inf_nan=False)
    #: Nats by which log-probabilities of golden prompts may differ: processors round differently.
    tolerance_nats: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    #: Number of times that a lost connection is opened again.
    reconnects: int = Field(default=5, ge=0)

    @field_validator("at", "root", "python", "glmexport", "api_key_file", "restart", "serve_options")
    @classmethod
    def _are_words(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for word in (value,) if isinstance(value, str) else value or ():
            if not word.isprintable():
                raise ValueError("has characters that nobody sees")
        return value

    @field_validator("root", "python", "glmexport", "api_key_file")
    @classmethod
    def _is_a_path(cls, path: str | None) -> str | None:
        # Programs and systemd read what begins otherwise as something else than a path.
        if path is not None and not _PATH.fullmatch(path):
            raise ValueError("has to begin with a letter, a digit, '/', '.', '_' or '~', and to have no backslash")
        return path

    @field_validator("restart")
    @classmethod
    def _is_a_command(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        if not command or not all(command):
            raise ValueError("has to be a command, word by word")
        return command

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, address: str) -> str:
        return str(ip_address(address))

    @field_validator("allow")
    @classmethod
    def _are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ip_network(network)) for network in networks)

    @model_validator(mode="after")
    def _can_be_served(self) -> Self:
        if self.smoke_port == self.port:
            raise ValueError("smoke_port is the port that the present release serves on")
        if not self.api_key_file and not ip_address(self.listen).is_loopback:
            raise ValueError("api_key_file is needed where listen is no loopback address")
        return self

    @property
    def local_address(self) -> str:
        """The address at which the server reaches what it serves."""
        address = ip_address(self.listen)
        return ("127.0.0.1" if address.version == 4 else "::1") if address.is_unspecified else self.listen

    @property
    def serve_command(self) -> tuple[str, ...]:
        """The command that serves a release, whose path is appended."""
        return (self.glmexport, "serve", *self.serve_options)


class Site(Definition):
    """The content of a site's file."""

    #: The public key, or the root certificate, that releases are signed with; relative to the file.
    trust: Path
    #: The subject that the signing certificate must have, where ``trust`` is a root: a distinguished name by RFC 4514,
    #: or ``email:``, ``DNS:`` or ``URI:`` and a name.
    subject: str | None = None
    #: Number of servers that may be switching, and so perhaps not answer, at a time.
    max_unavailable: int = Field(default=1, ge=1)
    servers: dict[str, Server] = Field(min_length=1)
    #: The directory of the file, which its paths are relative to.
    folder: Path

    def address(self, name: str) -> SshAddress:
        """Return the address of a server.

        Raises:
            InputError: its address is none.
        """
        server = self.servers[name]
        where = {"known_hosts": self.folder / server.known_hosts.expanduser()}
        if server.key:
            where["key"] = self.folder / server.key.expanduser()
        return parse_address(server.at, name, **where)

    @field_validator("subject")
    @classmethod
    def _is_a_line(cls, subject: str | None) -> str | None:
        if subject is not None and not (subject and subject.isprintable()):
            raise ValueError("has to be a name in one line")
        return subject

    def trusted(self) -> str:
        """Return what servers keep as trust.pem: the key or the root, PEM, and before it the subject if there is one.

        Raises:
            InputError: there is no such file, or no key in it.
        """
        path = self.folder / self.trust.expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: the key that releases are signed with cannot be read: {error}.",
                next_step="Name the public key, or the root certificate, as trust.",
            ) from error
        if "PRIVATE" in text or not ("BEGIN PUBLIC KEY" in text or "BEGIN CERTIFICATE" in text):
            raise InputError(
                f"{path} is no public key and no certificate in PEM.",
                next_step="Give what openssl pkey -pubout writes; a private key never leaves its place.",
            )
        if self.subject is None:
            return text
        if "BEGIN CERTIFICATE" not in text:
            raise InputError(
                f"The site names the subject {self.subject}, and {path} is no root certificate.",
                next_step="Name a root certificate as trust, or leave subject out.",
            )
        return f"{SUBJECT}{self.subject}\n{text}"


def open_site(path: Path) -> Site:
    """Return the site in a ``.toml`` file.

    Raises:
        DefinitionError: no such file, an unknown key, or a value that cannot be.
        InputError: an address that is none.
    """
    if not path.is_file():
        raise DefinitionError(f"There is no site file {path}.", next_step="Give a .toml file (README, 'Deploy').")
    site = read_toml(path, Site, {"folder": path.absolute().parent})
    for name in site.servers:
        site.address(name)
    return site
