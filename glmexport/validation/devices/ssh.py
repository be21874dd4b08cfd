"""A device that is reached by SSH: the job goes there by SFTP, a Python of the device answers it, results come back.

Nothing is installed on the device and nothing keeps running there. Below its work directory

    bundles/DIGEST/   a bundle's files, shared by all jobs that ask it
    jobs/DIGEST/      a job, the program, and results

are named by digests, so that whatever was interrupted is gone on with. A host key that known_hosts does not have for
the device is refused; none is ever added.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from glmexport.bundle.manifest import FileEntry
from glmexport.errors import InputError, MachineError
from glmexport.progress import Progress
from glmexport.quantization import write_atomically
from glmexport.validation.devices import transfer
from glmexport.validation.devices.answers import RESULT_BYTES, read_result
from glmexport.validation.devices.job import BUNDLE, JOB, QUESTIONS, RESULT, Job, read_job
from glmexport.validation.devices.runner import PROGRAM, SILENCE_S, Ended, events, program

if TYPE_CHECKING:
    import asyncssh

SCHEME = "ssh://"
#: Below the home directory that sshd begins in.
WORK = ".cache/glmexport-device"
#: Seconds to connect, to log in, and between signs of life, of which four may be missed.
_CONNECT_S, _ALIVE_S = 30, 15
#: After a lost connection; each further time twice as long, up to half a minute.
_WAIT_S = 1.0
#: Left free on the device for results beyond what their shapes take.
_SPARE = 1 << 24


@dataclass(frozen=True)
class SshRunner:
    """A device behind ``ssh://user@host:port``.

    ``key`` is a private key's file; without one, the agent's and the user's usual ones are tried. ``python`` has numpy
    and onnxruntime. ``reconnects`` is how often a lost connection is taken up again.
    """

    name: str
    host: str
    user: str | None = None
    port: int | None = None
    key: Path | None = None
    known_hosts: Path = Path("~/.ssh/known_hosts")
    python: str = "python3"
    work: str = WORK
    reconnects: int = 5
    silence: float = SILENCE_S

    def __call__(self, job: Path, results: Path, progress: Progress) -> None:
        """See ``Runner``."""
        try:
            import asyncssh  # noqa: F401
        except ImportError as error:
            raise MachineError(
                "Devices behind SSH need the package asyncssh.", next_step="pip install 'glmexport[devices]'"
            ) from error
        asyncio.run(self._run(job, results, progress))

    async def _run(self, job: Path, results: Path, progress: Progress) -> None:
        import asyncssh

        lost = 0
        while True:
            try:
                async with self._connected(first=lost == 0) as connection:
                    await _Visit(self, connection, job, results, progress).make()
                return
            except (asyncssh.DisconnectError, asyncssh.ChannelOpenError, ConnectionError) as error:
                lost += 1
                if lost > self.reconnects:
                    raise MachineError(
                        f"{self.name}: the connection was lost {lost} times; last: {error}.",
                        next_step="Look at the network and the device, then run the same command again: it goes on.",
                    ) from error
                progress.remark(f"{self.name}: connection lost ({error}); going on, {lost} of {self.reconnects} times.")
                await asyncio.sleep(min(30, _WAIT_S * 2 ** (lost - 1)))

    @asynccontextmanager
    async def _connected(self, *, first: bool) -> AsyncIterator[asyncssh.SSHClientConnection]:
        import asyncssh

        known = self.known_hosts.expanduser()
        if not known.is_file():
            raise InputError(
                f"{self.name}: there is no file of known hosts {known}.",
                next_step="Ask the device's administrator for its host key and write it there; "
                "ssh-keyscan prints a line to compare.",
            )
        options: dict[str, Any] = {"port": self.port} if self.port else {}
        if self.user:
            options["username"] = self.user
        if self.key:
            options["client_keys"] = [str(self.key.expanduser())]
        try:
            connection = await asyncssh.connect(
                self.host,
                known_hosts=str(known),
                connect_timeout=_CONNECT_S,
                login_timeout=_CONNECT_S,
                keepalive_interval=_ALIVE_S,
                keepalive_count_max=4,
                **options,
            )
        except asyncssh.HostKeyNotVerifiable as error:
            raise MachineError(
                f"{self.name}: the host key of {self.host} is refused: {known} does not have it for this host.",
                next_step="Ask the device's administrator which key is right. A changed key can be another machine.",
            ) from error
        except asyncssh.PermissionDenied as error:
            raise MachineError(
                f"{self.name}: {self.host} does not let this user in: {error.reason}.",
                next_step="Name the user and the private key that are meant for this device.",
            ) from error
        except (OSError, asyncssh.Error, asyncssh.KeyImportError) as error:
            reason = str(error) or type(error).__name__
            if first or isinstance(error, asyncssh.KeyImportError):
                raise MachineError(
                    f"{self.name}: {self.host} cannot be reached: {reason}.",
                    next_step="Correct the address or the key, or see that the device is up.",
                ) from error
            raise asyncssh.ConnectionLost(reason) from error
        async with connection:
            yield connection


def open_ssh(address: str, name: str | None = None, **options: Any) -> SshRunner:
    """The device of ``ssh://user@host:port``.

    Raises:
        InputError: it is none.
    """
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme != "ssh" or not parts.hostname or parts.path.strip("/") or parts.query or parts.password:
        raise InputError(
            f"{address!r} is no device behind SSH.",
            next_step="Write ssh://user@host or ssh://user@host:port; a key is named in a fleet file.",
        )
    return SshRunner(name=name or address, host=parts.hostname, user=parts.username, port=port, **options)


class _Visit:
    """What is done in one connection: everything that is still to be done."""

    def __init__(
        self,
        runner: SshRunner,
        connection: asyncssh.SSHClientConnection,
        folder: Path,
        results: Path,
        progress: Progress,
    ) -> None:
        self.runner, self.connection, self.progress = runner, connection, progress
        self.folder, self.results = folder, results
        self.job: Job = read_job(folder)
        self.digest = self.job.digest(folder)
        work = PurePosixPath(runner.work.removeprefix("~/"))
        self.place = work / "jobs" / self.digest[:24]
        self.bundle = work / "bundles" / self.job.bundle_digest.removeprefix("sha256:")[:24]

    async def make(self) -> None:
        """Send what is missing, run, fetch."""
        import asyncssh

        try:
            async with self.connection.start_sftp_client() as self.sftp:
                await self._send()
                await self._answer()
                await self._fetch()
        except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection) as error:
            raise asyncssh.ConnectionLost(error.reason) from error
        except asyncssh.SFTPError as error:
            raise MachineError(
                f"{self.runner.name}: the device refused a file below {self.runner.work}: {error.reason}.",
                next_step="See to its permissions, quota and free space there, then run the same command again.",
            ) from error

    async def _send(self) -> None:
        for folder in (self.bundle, self.place):
            await self.sftp.makedirs(str(folder), exist_ok=True)
        link, target = self.place / BUNDLE, PurePosixPath("../../bundles") / self.bundle.name
        if not await self.sftp.islink(str(link)):
            await self.sftp.symlink(str(target), str(link))
        await transfer.put_bytes(self.sftp, (self.folder / JOB).read_bytes(), self.place / JOB)
        await transfer.put_bytes(self.sftp, program(), self.place / PROGRAM)
        missing = await self._missing()
        if not missing:
            return
        # Answers have the shapes of the questions.
        answers = (self.folder / QUESTIONS).stat().st_size
        await self._require_free(sum(entry.size for entry in missing) + answers + _SPARE)
        chunks = sum(-(-entry.size // transfer.CHUNK) for entry in missing)
        with self.progress.track("Sending", chunks) as track:
            for entry in missing:
                await transfer.put(self.sftp, self.folder / entry.path, self._remote(entry.path), entry, track)

    def _remote(self, path: str) -> PurePosixPath:
        if path == QUESTIONS:
            return self.place / path
        return self.bundle / PurePosixPath(path).relative_to(BUNDLE)

    async def _require_free(self, needed: int) -> None:
        import asyncssh

        try:
            found = await self.sftp.statvfs(str(self.place))
        except asyncssh.SFTPOpUnsupported:
            return
        free = found.bavail * found.frsize
        if free < needed:
            raise MachineError(
                f"{self.runner.name}: there is no space left on the device: {free >> 20} MiB are free for "
                f"{self.runner.work}, and the job needs {-(-needed >> 20)} MiB more.",
                next_step="Free space there, or name a work directory on another disk in a fleet file.",
            )

    async def _missing(self) -> list[FileEntry]:
        """Files of the job that the device does not have, byte for byte."""
        names = [event["path"] async for event in self._run("--missing") if event.get("event") == "missing"]
        return [entry for entry in self.job.files if entry.path in names]

    async def _run(self, *arguments: str) -> AsyncIterator[dict[str, Any]]:
        """What the program on the device tells."""
        import asyncssh

        command = (self.runner.python.removeprefix("~/"), str(self.place / PROGRAM), str(self.place), *arguments)
        process = await self.connection.create_process(shlex.join(command), encoding=None)
        try:
            async for event in events(process.stdout.readline, self.progress, self.runner.name, self.runner.silence):
                yield event
        except Ended as error:
            died = await self._died(process, error)
            if self.connection.is_closed():
                raise asyncssh.ConnectionLost("while the job ran") from error
            raise died from error
        finally:
            process.close()

    async def _answer(self) -> None:
        async for _ in self._run(str(self.place / "results"), "--attended"):
            pass

    async def _died(self, process: asyncssh.SSHClientProcess[bytes], error: Ended) -> MachineError:
        import asyncssh

        try:
            said = await asyncio.wait_for(process.stderr.read(), 2)
            await asyncio.wait_for(process.wait_closed(), 2)
        except (TimeoutError, asyncssh.Error):
            said = b""
        last = (said.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        how = f"killed by {process.exit_signal[0]}" if process.exit_signal else f"exit {process.exit_status}"
        return MachineError(
            f"{error.message} ({self.runner.python}: {how}: {last})",
            next_step="Name a Python of the device that has numpy and onnxruntime ('python' in a fleet file).",
        )

    async def _fetch(self) -> None:
        remote = self.place / "results"
        content = await transfer.get_bytes(self.sftp, remote / RESULT, RESULT_BYTES, self.runner.name)
        result = read_result(content, self.job, self.digest, self.runner.name)
        wanted = [entry for entry in result.files if not transfer.has(self.results, entry)]
        with self.progress.track("Fetching", len(wanted)) as track:
            for entry in wanted:
                await transfer.get(self.sftp, remote / entry.path, self.results, entry, self.runner.name)
                track.advance(1, entry.path)
        write_atomically(self.results / RESULT, content)
