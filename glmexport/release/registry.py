"""A client of registries, as far as models need it: the distribution protocol of OCI, over HTTPS.

Blobs are read from disk in chunks and written to disk in chunks; what is sent and what arrives is compared with its
digest here, whatever the registry says.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from glmexport.foundation.errors import InputError, MachineError
from glmexport.foundation.untrusted import SMALL, parse_object
from glmexport.release.access import PASSWORD, TOKEN, USER, ImageReference, RegistryAccess, is_loopback
from glmexport.release.deadline import Deadline
from glmexport.release.incoming import damaged
from glmexport.release.layout import MANIFEST_TYPE, Descriptor

if TYPE_CHECKING:
    import httpx2

__all__ = ["ImageReference", "Registry", "RegistryAccess"]

#: Bytes of an upload's chunk, which is held in memory, so that it can be sent again.
_CHUNK = 16 << 20
#: Number of times that a registry which breaks off a download is asked for the rest.
_TRIES = 5
_REDIRECTS = 5
#: Bytes that are read of a manifest, of a token's answer, and of one that nobody looks into.
_LONGEST_MANIFEST, _LONGEST_TOKEN, _LONGEST_REST = 4 << 20, 1 << 16, 1 << 16
#: Seconds for an answer that is short, and for the beginning of a long one.
_ANSWER_S = 120.0
_TOKEN_TEXT = re.compile(r"[\x21-\x7e]+")


class Registry:
    """One repository of a registry.

    Raises:
        InputError: the certificates of ``access`` cannot be read.
    """

    def __init__(self, reference: ImageReference, access: RegistryAccess) -> None:
        import httpx2

        self._access, self._where = access, reference
        # Who gives certificates means TLS, on this machine, too.
        plain = not access.authority and (access.plain_http or is_loopback(reference.host))
        self._base = f"{'http' if plain else 'https'}://{reference.host}"
        try:
            context = ssl.create_default_context(cafile=access.authority) if access.authority else True
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"{access.authority} has no certificates: {error}.", next_step="Give certificates in PEM with --ca."
            ) from error
        self._client = httpx2.Client(
            verify=context,
            timeout=httpx2.Timeout(60, connect=10),
            # A connection a request, which its deadline may cut; and nothing that becomes longer when it is read.
            limits=httpx2.Limits(max_keepalive_connections=0),
            headers={"Accept-Encoding": "identity"},
        )
        self._authorization = f"Bearer {access.token}" if access.token else None

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def has(self, digest: str) -> bool:
        """Return whether the blob is there."""
        answer = self._ask("HEAD", self._blob(digest))
        if answer.status_code not in (200, 404):
            raise self._refused(answer, f"the blob {digest}")
        return answer.status_code == 200

    def upload(self, path: Path, blob: Descriptor, sent: Callable[[int], None]) -> None:
        """Send a blob in chunks; ``sent`` is called with the number of bytes.

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
        finish = self._url(location).copy_merge_params({"digest": blob.digest})
        self._expect(self._ask("PUT", str(finish)), 201, f"the blob {blob.digest}")

    def put_manifest(self, content: bytes, digest: str, tag: str) -> None:
        """Store a manifest under ``tag``."""
        path = f"/v2/{self._where.name}/manifests/{tag}"
        answer = self._expect(self._ask("PUT", path, {"Content-Type": MANIFEST_TYPE}, content), 201, "the manifest")
        told = answer.headers.get("docker-content-digest", digest)
        if told != digest:
            raise damaged("The manifest", str(self._where))

    def manifest(self) -> bytes:
        """Return the manifest of the image, not compared with its digest yet."""
        path = f"/v2/{self._where.name}/manifests/{self._where.digest or self._where.tag}"
        with self._stream(path, {"Accept": MANIFEST_TYPE}) as answer:
            self._expect(answer, 200, str(self._where))
            content = _read(answer, _LONGEST_MANIFEST)
        if content is None:
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
        with self._stream(self._blob(blob.digest), headers, long=True) as answer:
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

    def _url(self, location: str) -> httpx2.URL:
        """Return an absolute address, over TLS unless the registry itself is without."""
        import httpx2

        base = httpx2.URL(self._base)
        try:
            url = base.join(location)
        except httpx2.InvalidURL as error:
            raise MachineError(
                f"{self._where.host} sends us to an address that is none: {error}.",
                next_step="Look into the log of the registry.",
            ) from error
        without = base.scheme == "http" and (self._access.plain_http or is_loopback(url.host))
        if not url.host or not (url.scheme == "https" or (url.scheme == "http" and without)):
            raise MachineError(
                f"{self._where.host} sends us to {url.scheme}://{url.host}, which is not encrypted.",
                next_step="Correct the registry, or give --plain-http on a network that you trust.",
            )
        return url

    def _ask(
        self, method: str, url: str, headers: dict[str, str] | None = None, content: bytes = b""
    ) -> httpx2.Response:
        """Return an answer of which the beginning is enough."""
        with self._stream(url, headers or {}, method, content) as answer:
            _read(answer, _LONGEST_REST)
            return answer

    @contextmanager
    def _stream(
        self, location: str, headers: dict[str, str], method: str = "GET", content: bytes = b"", *, long: bool = False
    ) -> Iterator[httpx2.Response]:
        """Yield an answer: after signing in where that is asked for, and after redirects of what is only read.

        One that is not ``long`` has to end in time, and of a long one the beginning has to come.
        """
        url, redirects, asked = self._url(location), 0, False
        while True:
            own = _origin(url) == _origin(self._url(""))
            # Elsewhere, as in the object store that a registry sends us to, nobody has to know who we are.
            signed_in = {"Authorization": self._signed_in(url)} if own and self._authorization else {}
            with self._answer(method, url, {**headers, **signed_in}, content, long=long) as answer:
                if answer.status_code == 401 and own and not asked:
                    asked = True
                    self._sign_in(answer.headers.get("www-authenticate", ""))
                    continue
                if answer.is_redirect and method in ("GET", "HEAD") and redirects < _REDIRECTS:
                    redirects += 1
                    url = self._url(str(url.join(answer.headers["location"])))
                    continue
                yield answer
                return

    @contextmanager
    def _answer(
        self, method: str, url: httpx2.URL, headers: dict[str, str], content: bytes = b"", *, long: bool = False
    ) -> Iterator[httpx2.Response]:
        import httpx2

        with ExitStack() as stack:
            deadline = stack.enter_context(Deadline(_ANSWER_S))
            try:
                request = self._client.build_request(
                    method, url, headers=headers, content=content, extensions={"trace": deadline.trace}
                )
                answer = self._client.send(request, stream=True)
                stack.callback(answer.close)
                if long:
                    deadline.stop()
                yield answer
            except (httpx2.TransportError, httpx2.InvalidURL) as error:
                raise self._unreachable(error, late=deadline.passed) from error

    def _signed_in(self, url: httpx2.URL) -> str:
        """Return the header that says who we are, where nobody else can read it."""
        if url.scheme != "https" and not is_loopback(url.host):
            raise InputError(
                f"{self._where.host} would get the password without TLS.",
                next_step="Use a registry with TLS, or leave --plain-http or the password out.",
            )
        assert self._authorization
        return self._authorization

    def _sign_in(self, challenge: str) -> None:
        """Answer a challenge: by name and password, or by a token that they are exchanged for.

        Raises:
            InputError: a host wants the password that was not named for that.
        """
        kind, _, rest = challenge.partition(" ")
        own = self._access.pair_for(self._where.host, self._where.host)
        if kind.lower() == "basic" and own:
            self._authorization = _basic(own)
        elif kind.lower() == "bearer" and not self._access.token:
            fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
            realm = self._url(fields.get("realm", ""))
            query = {name: fields[name] for name in ("service", "scope") if name in fields}
            self._authorization = self._token(realm, query)

    def _token(self, realm: httpx2.URL, query: dict[str, str]) -> str | None:
        """Return what a realm gives for the password, if it may learn it, or for nothing where there is none."""
        host = realm.netloc.decode("ascii")
        pair = self._access.pair_for(host, self._where.host)
        if pair is None and self._access.user is not None:
            raise InputError(
                f"{self._where.host} sends us to {host} with the password.",
                next_step=f"If that is where its tokens come from, give --token-host {host}; else do not use it.",
            )
        if pair and realm.scheme != "https" and not is_loopback(realm.host):
            raise InputError(f"{host} would get the password without TLS.", next_step="Use a registry with TLS.")
        headers = {"Authorization": _basic(pair)} if pair else {}
        with self._answer("GET", realm.copy_merge_params(query), headers) as answer:
            if answer.status_code != 200:
                return None
            content = _read(answer, _LONGEST_TOKEN)
            try:
                told = parse_object(content or b"", SMALL)
                token = told.get("token") or told["access_token"]
                if not _TOKEN_TEXT.fullmatch(token):
                    raise ValueError("no token")
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise self._refused(answer, "a token") from error
        return f"Bearer {token}"

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

    def _unreachable(self, error: Exception, *, late: bool) -> MachineError:
        reason = f"its answer did not end in {_ANSWER_S:.0f} s" if late else str(error) or type(error).__name__
        return MachineError(
            f"{self._where.host} cannot be reached: {reason}.",
            next_step="Check the network and the registry, then run the same command again; it goes on where it was.",
        )


def _read(answer: httpx2.Response, longest: int) -> bytes | None:
    """Return the content of an answer, as it came; None if it is longer than ``longest`` bytes."""
    content = bytearray()
    for piece in answer.iter_raw(1 << 16):
        content += piece
        if len(content) > longest:
            return None
    return bytes(content)


def _basic(pair: tuple[str, str]) -> str:
    return f"Basic {base64.b64encode(':'.join(pair).encode()).decode()}"


def _origin(url: httpx2.URL) -> tuple[str, bytes]:
    """Return the place that a password is for: a host by a port, with or without TLS."""
    return url.scheme, url.netloc
