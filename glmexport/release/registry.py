"""A client of registries, as far as models need it: the distribution protocol of OCI, over HTTPS.

Blobs are read from disk in chunks and written to disk in chunks; what is sent and what arrives is compared with its
digest here, whatever the registry says.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmexport.errors import InputError, MachineError
from glmexport.release.incoming import damaged
from glmexport.release.layout import MANIFEST_TYPE, Descriptor
from glmexport.untrusted import SMALL, parse_object, read_regular

if TYPE_CHECKING:
    import httpx2

#: Of an upload; a chunk is held in memory, so that it can be sent again.
_CHUNK = 16 << 20
#: A registry that breaks off a download is asked for the rest so often.
_TRIES = 5
_REDIRECTS = 5
_LONGEST_MANIFEST = 4 << 20
_REFERENCE = re.compile(
    r"(?P<host>[A-Za-z0-9.-]+(:[0-9]+)?|\[[0-9A-Fa-f:]+\](:[0-9]+)?)"
    r"/(?P<name>[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*)"
    r"(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
USER, PASSWORD, TOKEN = "GLMEXPORT_REGISTRY_USER", "GLMEXPORT_REGISTRY_PASSWORD", "GLMEXPORT_REGISTRY_TOKEN"


@dataclass(frozen=True)
class Reference:
    """An image in a registry: by tag, by digest, or by both, where the digest counts."""

    host: str
    name: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Of ``HOST[:PORT]/NAME[:TAG][@sha256:DIGEST]``.

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
class Access:
    """How a registry is reached: who asks, and what vouches for the server."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    #: Certificates that vouch for the server, instead of the system's.
    authority: Path | None = None
    #: HTTP without TLS not only on this machine.
    plain_http: bool = False

    @classmethod
    def given(cls, host: str, authority: Path | None, auth_file: Path | None, *, plain_http: bool) -> Access:
        """From the environment, or from a file such as docker's config.json.

        Raises:
            InputError: the file cannot be read.
        """
        user, password, token = (os.environ.get(name) for name in (USER, PASSWORD, TOKEN))
        if auth_file and not (user or token):
            try:
                entry = parse_object(read_regular(auth_file, SMALL.size), SMALL)["auths"].get(host, {})
                if "auth" in entry:
                    user, _, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
                token = entry.get("registrytoken")
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise InputError(
                    f"{auth_file} cannot be read: {type(error).__name__}.", next_step="Give a config.json as docker's."
                ) from error
        return cls(user, password, token, authority, plain_http)


class Registry:
    """One repository of a registry.

    Raises:
        InputError: the certificates of ``access`` cannot be read.
    """

    def __init__(self, reference: Reference, access: Access) -> None:
        import httpx2

        self._access, self._where = access, reference
        # Who gives certificates means TLS, on this machine, too.
        plain = not access.authority and (access.plain_http or _is_loopback(reference.host))
        self._base = f"{'http' if plain else 'https'}://{reference.host}"
        try:
            context = ssl.create_default_context(cafile=access.authority) if access.authority else True
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"{access.authority} has no certificates: {error}.", next_step="Give certificates in PEM with --ca."
            ) from error
        self._client = httpx2.Client(verify=context, timeout=httpx2.Timeout(60, connect=10))
        self._authorization = f"Bearer {access.token}" if access.token else None

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def has(self, digest: str) -> bool:
        """Whether the blob is there."""
        answer = self._ask("HEAD", self._blob(digest))
        if answer.status_code not in (200, 404):
            raise self._refused(answer, f"the blob {digest}")
        return answer.status_code == 200

    def upload(self, path: Path, blob: Descriptor, sent: Callable[[int], None]) -> None:
        """Send a blob in chunks; ``sent`` is told how many bytes.

        Raises:
            UnverifiedError: the file does not have the digest; nothing is stored then.
        """
        answer = self._expect(self._ask("POST", f"/v2/{self._where.name}/blobs/uploads/"), 202, "an upload")
        location, start, found = answer.headers.get("location", ""), 0, hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
                headers = {
                    "Content-Type": "application/octet-stream",
                    "Content-Range": f"{start}-{start + len(chunk) - 1}",
                }
                answer = self._expect(self._ask("PATCH", location, headers, chunk), 202, f"the blob {blob.digest}")
                location, start = answer.headers.get("location", ""), start + len(chunk)
                sent(len(chunk))
        if found.hexdigest() != blob.hex:
            self._ask("DELETE", location)
            raise damaged(blob.name or f"The blob {blob.digest}", str(path))
        finish = self._client.build_request("PUT", self._url(location)).url.copy_merge_params({"digest": blob.digest})
        self._expect(self._ask("PUT", str(finish)), 201, f"the blob {blob.digest}")

    def put_manifest(self, content: bytes, digest: str, tag: str) -> None:
        """Store a manifest under ``tag``."""
        path = f"/v2/{self._where.name}/manifests/{tag}"
        answer = self._expect(self._ask("PUT", path, {"Content-Type": MANIFEST_TYPE}, content), 201, "the manifest")
        told = answer.headers.get("docker-content-digest", digest)
        if told != digest:
            raise damaged("The manifest", str(self._where))

    def manifest(self) -> bytes:
        """The manifest of the image, not compared with its digest yet."""
        path = f"/v2/{self._where.name}/manifests/{self._where.digest or self._where.tag}"
        with self._stream(path, {"Accept": MANIFEST_TYPE}) as answer:
            self._expect(answer, 200, str(self._where))
            content = b""
            for piece in answer.iter_bytes():
                content += piece
                if len(content) > _LONGEST_MANIFEST:
                    raise damaged("The manifest", str(self._where))
        return content

    def download(self, blob: Descriptor, path: Path, received: Callable[[int], None]) -> None:
        """Write a blob to ``path``, going on behind what is there already from another time.

        Raises:
            UnverifiedError: what arrives does not have the digest; ``path`` is removed then.
            MachineError: the registry breaks off again and again; ``path`` stays.
        """
        import httpx2

        for attempt in range(_TRIES):
            try:
                self._download_rest(blob, path, received)
                break
            except MachineError as error:
                if attempt == _TRIES - 1 or not isinstance(error.__cause__, httpx2.TransportError):
                    raise
        found = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
        if found.hexdigest() != blob.hex:
            path.unlink()
            raise damaged(blob.name or f"The blob {blob.digest}", str(self._where))

    def _download_rest(self, blob: Descriptor, path: Path, received: Callable[[int], None]) -> None:
        start = path.stat().st_size if path.exists() else 0
        if start >= blob.size and path.exists():
            return
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._stream(self._blob(blob.digest), {**headers, "Accept-Encoding": "identity"}) as answer:
            # One that knows no ranges gives all of it.
            start = start if answer.status_code == 206 else 0
            if answer.status_code not in (200, 206):
                raise self._refused(answer, blob.name or blob.digest)
            with path.open("r+b" if start else "wb") as file:
                file.seek(start)
                for piece in answer.iter_raw():
                    start += len(piece)
                    if start > blob.size:
                        raise damaged(blob.name or f"The blob {blob.digest}", str(self._where))
                    file.write(piece)
                    received(len(piece))
                file.flush()
                os.fsync(file.fileno())

    def _blob(self, digest: str) -> str:
        return f"/v2/{self._where.name}/blobs/{digest}"

    def _url(self, location: str) -> str:
        """Absolute; over TLS, unless the registry itself is without."""
        import httpx2

        url = httpx2.URL(self._base).join(location)
        allowed = url.scheme == "https" or (
            url.scheme == "http" and (self._access.plain_http or _is_loopback(url.host))
        )
        if not allowed:
            raise MachineError(
                f"{self._where.host} sends us to {url.scheme}://{url.host}, which is not encrypted.",
                next_step="Correct the registry, or give --plain-http on a network that you trust.",
            )
        return str(url)

    def _ask(
        self, method: str, url: str, headers: dict[str, str] | None = None, content: bytes = b""
    ) -> httpx2.Response:
        with self._stream(url, headers or {}, method, content) as answer:
            answer.read()
            return answer

    @contextmanager
    def _stream(
        self, url: str, headers: dict[str, str], method: str = "GET", content: bytes = b""
    ) -> Iterator[httpx2.Response]:
        """An answer: after signing in where that is asked for, and after redirects of what is only read."""
        import httpx2

        url, redirects, asked = self._url(url), 0, False
        try:
            while True:
                own = httpx2.URL(url).netloc == httpx2.URL(self._base).netloc
                # Elsewhere, as in the object store that a registry sends us to, nobody has to know who we are.
                signed_in = {"Authorization": self._authorization} if own and self._authorization else {}
                with self._client.stream(method, url, headers={**headers, **signed_in}, content=content) as answer:
                    if answer.status_code == 401 and own and not asked:
                        asked = True
                        self._sign_in(answer.headers.get("www-authenticate", ""))
                        continue
                    if answer.is_redirect and method in ("GET", "HEAD") and redirects < _REDIRECTS:
                        redirects += 1
                        url = self._url(str(httpx2.URL(url).join(answer.headers["location"])))
                        continue
                    yield answer
                    return
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def _sign_in(self, challenge: str) -> None:
        """Answer a challenge: by name and password, or by a token that they are exchanged for."""
        kind, _, rest = challenge.partition(" ")
        basic = None
        if self._access.user is not None:
            pair = f"{self._access.user}:{self._access.password or ''}"
            basic = f"Basic {base64.b64encode(pair.encode()).decode()}"
        if kind.lower() == "basic" and basic:
            self._authorization = basic
        elif kind.lower() == "bearer" and not self._access.token:
            fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
            query = {name: fields[name] for name in ("service", "scope") if name in fields}
            headers = {"Authorization": basic} if basic else {}
            answer = self._client.get(self._url(fields.get("realm", "")), params=query, headers=headers)
            if answer.status_code == 200:
                try:
                    told: dict[str, Any] = answer.json()
                    self._authorization = f"Bearer {told.get('token') or told['access_token']}"
                except (ValueError, KeyError, AttributeError) as error:
                    raise self._refused(answer, "a token") from error

    def _expect(self, answer: httpx2.Response, status: int, what: str) -> httpx2.Response:
        if answer.status_code != status:
            raise self._refused(answer, what)
        return answer

    def _refused(self, answer: httpx2.Response, what: str) -> InputError | MachineError:
        host, status = self._where.host, answer.status_code
        if status in (401, 403):
            return InputError(
                f"{host} does not let us have or store {what} ({status}).",
                next_step=f"Set {USER} and {PASSWORD}, or {TOKEN}, or give --auth-file.",
            )
        if status == 404:
            return InputError(f"{host} does not have {what}.", next_step="Check the name, the tag and the digest.")
        return MachineError(f"{host} answers {status} to {what}.", next_step="Look into the log of the registry.")

    def _unreachable(self, error: Exception) -> MachineError:
        reason = str(error) or type(error).__name__
        return MachineError(
            f"{self._where.host} cannot be reached: {reason}.",
            next_step="Check the network and the registry, then run the same command again; it goes on where it was.",
        )


def _is_loopback(host: str) -> bool:
    """Whether ``host``, with or without a port, is this machine."""
    name = host[1 : host.index("]")] if host.startswith("[") else host.rpartition(":")[0] or host
    if name.count(":") and not host.startswith("["):
        name = host
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
