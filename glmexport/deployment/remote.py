"""One server, reached by SSH: SFTP sends what it lacks, and a program of the standard library does the rest there."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from glmexport.deployment.events import ServerFacts, check_event
from glmexport.deployment.signed import SignedBundle
from glmexport.deployment.site import Server, Site
from glmexport.foundation.errors import InputError, MachineError
from glmexport.foundation.progress import Progress, Silent
from glmexport.wire import transfer
from glmexport.wire.runner import LINE_BYTES, Ended, events, packed
from glmexport.wire.server.layout import contained

if TYPE_CHECKING:
    import asyncssh

_PROGRAM = "deploy.pyz"
_PACKAGE = "glmexport.wire.server"
_MODULES = ("activation", "answering", "facts", "layout", "ledger", "receiving", "verifying")
_ELSEWHERE = (
    "glmexport.release.certificates",
    "glmexport.release.encodings",
    "glmexport.release.envelope",
    "glmexport.release.golden_answers",
    "glmexport.release.verifier",
    "glmexport.foundation.untrusted",
    "glmexport.wire.standalone",
)
#: Names of the commands that take their time; the others are done before a bar could be read.
_SHOWN = {"assemble": "Assembling on {}", "activate": "Switching {}", "rollback": "Switching {}"}
_LABELS = {"assembled": "Assembling", "golden": "Golden prompts"}
#: Seconds without a word after which the program is given up: weights of hundreds of gigabytes are read twice, and a
#: release may take minutes to load.
_SILENCE_S = 7200.0
#: Seconds between signs of life of who sends; and for what a program that ended has on its standard error.
_BEAT_S, _LAST_WORDS_S = 15.0, 10.0
#: Bytes of standard error that are kept.
_LAST_BYTES = 2000
#: Events of one command: a file of a release, or a prompt, has one each.
_MOST_EVENTS = 1 << 20
#: Bytes that are left free beyond what a release takes.
_SPARE = 1 << 26


def program() -> bytes:
    """Return the server's program as one file that Python runs."""
    return packed(f"{_PACKAGE}.__main__", *(f"{_PACKAGE}.{name}" for name in _MODULES), *_ELSEWHERE)


class Remote:
    """A server in one connection. ``options`` are what an order has beside the release and the server's settings."""

    def __init__(self, site: Site, name: str, connection: asyncssh.SSHClientConnection, progress: Progress) -> None:
        self.name, self.server = name, site.servers[name]
        self._site, self._connection, self._progress = site, connection, progress
        self._root = PurePosixPath(self.server.root.removeprefix("~/"))

    async def order(self, release: SignedBundle | None, name: str, **options: Any) -> None:
        """Write the order to the server, with the program that does it."""
        await self._put({f"orders/{name}.json": order_document(self._site, self.server, release, **options)})

    async def install(self) -> None:
        """Write the program to the server."""
        await self._put({})

    async def _put(self, contents: dict[str, bytes]) -> None:
        import asyncssh

        async with self._connection.start_sftp_client() as sftp:
            try:
                await sftp.makedirs(str(self._root / "orders"), exist_ok=True)
                for path, content in {_PROGRAM: program(), **contents}.items():
                    await transfer.put_bytes(sftp, content, self._root / path)
            except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection) as error:
                raise asyncssh.ConnectionLost(error.reason) from error
            except asyncssh.SFTPError as error:
                raise self._refused(error) from error

    def _refused(self, error: asyncssh.SFTPError) -> MachineError:
        return MachineError(
            f"{self.name}: the server refused a file below {self._root}: {error.reason}.",
            next_step="See to its owner, permissions, quota and free space, then run the same command again.",
        )

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Hold the turn to send: nobody else sends to the server meanwhile.

        A sender who is killed, or loses the line, gives it up.

        Raises:
            Told: somebody else sends, and has for minutes.
        """
        process, said = await self._process("hold")
        beating: asyncio.Task[None] | None = None
        told = events(process.stdout.readline, Silent(), self.name, _SILENCE_S)
        try:
            async for event in told:
                if event.get("event") == "held":
                    break
            beating = asyncio.create_task(_beat(process))
            yield
        except Ended as error:
            raise await self._ended(said, "hold", error) from error
        finally:
            if beating:
                beating.cancel()
            await told.aclose()
            said.cancel()
            process.close()

    async def _process(
        self, command: str, *arguments: str
    ) -> tuple[asyncssh.SSHClientProcess[bytes], asyncio.Task[bytes]]:
        """The program at work, and the end of what it has on its standard error, which is read while it works."""
        words = (self.server.python, str(self._root / _PROGRAM), command, str(self._root), *arguments)
        process = await self._connection.create_process(shlex.join(words), encoding=None)
        return process, asyncio.create_task(_last_words(process.stderr.read))

    async def _ended(self, said: asyncio.Task[bytes], command: str, error: Ended) -> Exception:
        """Return the error of a program that ended before it was done."""
        import asyncssh

        if self._connection.is_closed():
            return asyncssh.ConnectionLost(f"while {command} ran")
        words = b""
        with contextlib.suppress(asyncio.TimeoutError):
            words = await asyncio.wait_for(said, _LAST_WORDS_S)
        last = words.decode("utf-8", "replace").strip().splitlines()[-1:]
        return MachineError(
            f"{error.message} ({self.server.python}: {''.join(last) or 'no message'})",
            next_step="Name a Python of the server, 3.9 or later, as 'python' in the site's file.",
        )

    async def run(self, command: str, *arguments: str) -> AsyncIterator[dict[str, Any]]:
        """Run a command, and yield what the program tells.

        Raises:
            Told: what went wrong, by the program.
            MachineError: it did not run.
        """
        process, said = await self._process(command, *arguments)
        try:
            label = _SHOWN.get(command, "").format(self.name)
            progress: Progress = self._progress if label else Silent()
            told = events(process.stdout.readline, progress, self.name, _SILENCE_S, _LABELS, label)
            count = 0
            async for event in told:
                yield event
                count += 1
                if count > _MOST_EVENTS:
                    raise Ended(f"{self.name} tells without end.", next_step="Look at the server.")
        except Ended as error:
            raise await self._ended(said, command, error) from error
        finally:
            said.cancel()
            process.close()

    async def result(self, command: str, event: str, *arguments: str) -> dict[str, Any]:
        """Run a command, and return its last ``event``."""
        found: dict[str, Any] = {}
        async for told in self.run(command, *arguments):
            if told.get("event") == event:
                found = told
        return found

    async def send(self, release: SignedBundle, order_name: str) -> int:
        """Send the files that the server does not have; return their bytes."""
        import asyncssh

        paths, missing = {entry.path for entry in release.files}, set[str]()
        async for told in self.run("missing", order_name):
            if told.get("event") == "missing" and isinstance(told.get("path"), str):
                missing |= paths & {told["path"]}
        # One file of several with the same content is enough.
        wanted = list({entry.sha256: entry for entry in release.files if entry.path in missing}.values())
        chunks = sum(-(-entry.size // transfer.CHUNK) for entry in wanted)
        async with self._connection.start_sftp_client() as sftp:
            try:
                with self._progress.track(f"Sending to {self.name}", chunks) as track:
                    for entry in wanted:
                        remote = self._root / "incoming" / entry.sha256
                        await transfer.put(sftp, release.directory / entry.path, remote, entry, track)
            except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection) as error:
                raise asyncssh.ConnectionLost(error.reason) from error
            except asyncssh.SFTPError as error:
                raise self._refused(error) from error
        return sum(entry.size for entry in wanted)


async def _last_words(read: Callable[[int], Awaitable[bytes]]) -> bytes:
    """The last of what is read, however much it is."""
    last = b""
    while piece := await read(LINE_BYTES):
        last = (last + piece)[-_LAST_BYTES:]
    return last


async def _beat(process: asyncssh.SSHClientProcess[bytes]) -> None:
    """Signs of life, while this is awaited."""
    while True:
        process.stdin.write(b"\n")
        await asyncio.sleep(_BEAT_S)


def order_document(site: Site, server: Server, release: SignedBundle | None, **options: Any) -> bytes:
    """Return the content of orders/ID.json."""
    import json

    settings: dict[str, Any] = {
        "format": "glmexport-order",
        "version": 1,
        "release": release.name if release else None,
        "files": [entry.model_dump() for entry in release.files] if release else [],
        "trust": site.trusted(),
        "serve": server.serve_command,
        "restart": server.restart,
        "host": server.local_address,
        "port": server.port,
        "smoke_port": server.smoke_port,
        "api_key_file": server.api_key_file,
        "ready_s": server.ready_s,
        "tolerance_nats": server.tolerance_nats,
        "allow_older": False,
        "replace_trust": False,
        "reason": "deployment",
        **options,
    }
    return (json.dumps(settings, indent=1) + "\n").encode()


def order_name() -> str:
    """Return a new name of an order, so that each of two deployments of one release learns what became of itself."""
    return secrets.token_hex(16)


def require_fit(who: str, release: SignedBundle, told: dict[str, Any]) -> None:
    """Check that a release can come to a server whose facts are those in ``told``.

    Raises:
        MachineError: no space, no openssl, no glmexport, or another kind of machine.
    """
    facts = check_event(ServerFacts, told, who)
    needed = release.bytes - min(facts.received_bytes, release.bytes) + _SPARE
    if facts.free_bytes < needed:
        raise MachineError(
            f"{who}: {facts.free_bytes >> 20} MiB are free, and the release needs {needed >> 20} MiB.",
            next_step="Free space there; glmexport prune removes former releases.",
        )
    if facts.free_inodes is not None and facts.free_inodes < 2 * len(release.files) + 100:
        raise MachineError(f"{who}: there are no inodes left for the release.", next_step="Remove files there.")
    if not facts.openssl:
        raise MachineError(
            f"{who} has no openssl, by which signatures are verified.", next_step="Install it there (openssl)."
        )
    if facts.host is None:
        raise MachineError(
            f"{who}: glmexport does not run there: {facts.host_unknown_because}.",
            next_step="Install it there, and name it as 'glmexport' in the site's file.",
        )
    lacking = facts.host.lacking.get(release.target)
    if lacking:
        raise MachineError(
            f"{who} is no machine of the target {release.target}: {' '.join(lacking)}",
            next_step=f"Build for it: it is of {facts.host.host}.",
        )
    if any(not contained(entry.path) for entry in release.files):
        raise InputError(f"{release.directory} has a file outside of itself.", next_step="Build the bundle again.")
