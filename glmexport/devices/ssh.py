"""A device that is reached by SSH: the job goes there by SFTP, the device's Python answers it, results come back.

Nothing is installed on the device and nothing keeps running there. Below its work directory

    bundles/DIGEST/   a bundle's files, shared by all jobs that ask it
    jobs/DIGEST/      a job, the program, and results

are named by digests, so that an interrupted run is continued. A host key that known_hosts does not have for
the device is refused; none is ever added.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from glmexport.bundle.manifest import FileEntry
from glmexport.devices.answers import RESULT_BYTES, read_result
from glmexport.devices.job import BUNDLE, JOB, QUESTIONS, RESULT, DeviceJob, read_job
from glmexport.foundation.errors import MachineError
from glmexport.foundation.files import write_atomically
from glmexport.foundation.progress import Progress
from glmexport.wire import transfer
from glmexport.wire.runner import PROGRAM, SILENCE_S, Ended, events, program
from glmexport.wire.ssh import SshAddress, parse_address, persist, require_asyncssh

if TYPE_CHECKING:
    import asyncssh

#: The work directory, relative to the home directory that sshd begins in.
WORK = ".cache/glmexport-device"
#: Bytes that are left free on the device for results beyond the size of their tensors.
_SPARE = 1 << 24


@dataclass(frozen=True)
class SshRunner:
    """A device behind SSH.

    ``python`` has numpy and onnxruntime. A lost connection is opened again ``reconnects`` times.
    """

    address: SshAddress
    python: str = "python3"
    work: str = WORK
    reconnects: int = 5
    silence: float = SILENCE_S

    @property
    def name(self) -> str:
        """The name for messages."""
        return self.address.name

    def __call__(self, job: Path, results: Path, progress: Progress) -> None:
        """Let the device answer the job; see ``Runner``."""
        require_asyncssh("devices")

        async def visit(connection: asyncssh.SSHClientConnection) -> None:
            await _Visit(self, connection, job, results, progress).make()

        asyncio.run(persist(self.address, self.reconnects, progress, visit))


def open_ssh(address: str, name: str | None = None, **options: Any) -> SshRunner:
    """Return the device of ``ssh://user@host:port``; ``options`` are those of its address and of its runner.

    Raises:
        InputError: the address is not of that form.
        MachineError: the SSH library is not installed: raised before the original is asked anything.
    """
    require_asyncssh("devices")
    where = {key: options.pop(key) for key in ("key", "known_hosts") if key in options}
    return SshRunner(parse_address(address, name, **where), **options)


class _Visit:
    """One connection, in which everything is done that is still to do."""

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
        self.job: DeviceJob = read_job(folder)
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
        # The shapes of the answers follow from the questions.
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
        """Return the files of the job that the device does not have, byte for byte."""
        names = [event["path"] async for event in self._run("--missing") if event.get("event") == "missing"]
        return [entry for entry in self.job.files if entry.path in names]

    async def _run(self, *arguments: str) -> AsyncIterator[dict[str, Any]]:
        """Run the program on the device, and show the events that it reports."""
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
        result = read_result(content, self.folder, self.runner.name)
        wanted = [entry for entry in result.files if not transfer.has(self.results, entry)]
        with self.progress.track("Fetching", len(wanted)) as track:
            for entry in wanted:
                await transfer.get(self.sftp, remote / entry.path, self.results, entry, self.runner.name)
                track.advance(1, entry.path)
        write_atomically(self.results / RESULT, content)
