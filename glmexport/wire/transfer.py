"""Files go to a device and back by SFTP: an interrupted one is continued, and none may exceed its announced size."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from glmexport.bundle.manifest import FileEntry
from glmexport.foundation.errors import MachineError
from glmexport.foundation.files import sha256
from glmexport.foundation.progress import Track

if TYPE_CHECKING:
    import asyncssh

#: Number of bytes that are sent, or fetched, between two checks whether anybody still waits.
CHUNK = 1 << 22


async def put_bytes(sftp: asyncssh.SFTPClient, content: bytes, remote: PurePosixPath) -> None:
    """Replace a small file."""
    # Two that write it at once have a file each.
    partial = f"{remote}.{secrets.token_hex(4)}.partial"
    async with _open(sftp)(partial, "wb") as file:
        await file.write(content)
    await sftp.posix_rename(partial, str(remote))


async def put(sftp: asyncssh.SFTPClient, path: Path, remote: PurePosixPath, entry: FileEntry, track: Track) -> None:
    """Send a file from where it was interrupted, and give it its name when it is whole.

    ``track`` has a step for each chunk.
    """
    await sftp.makedirs(str(remote.parent), exist_ok=True)
    partial = f"{remote}.{entry.sha256[:12]}.partial"
    held = (await sftp.getsize(partial) or 0) if await sftp.exists(partial) else 0
    # Parts of a chunk are written in any order, so that the last chunk may have gaps.
    start = max(0, -(-min(held, entry.size) // CHUNK) - 1) * CHUNK
    track.advance(start // CHUNK, entry.path)
    with path.open("rb") as source:
        source.seek(start)
        async with _open(sftp)(partial, "r+b" if held else "wb") as file:
            for offset in range(start, entry.size, CHUNK):
                await file.write(source.read(CHUNK), offset)
                track.advance(1, entry.path)
    await sftp.posix_rename(partial, str(remote))


async def get_bytes(sftp: asyncssh.SFTPClient, remote: PurePosixPath, most: int, who: str) -> bytes:
    """Return the content of a small file.

    Raises:
        MachineError: it has more than ``most`` bytes.
    """
    async with _open(sftp)(str(remote), "rb") as file:
        content: bytes = await file.read(most + 1)
    if len(content) > most:
        raise MachineError(f"{who}: {remote.name} has more than {most} bytes.", next_step="Look at the device.")
    return content


async def get(sftp: asyncssh.SFTPClient, remote: PurePosixPath, directory: Path, entry: FileEntry, who: str) -> None:
    """Fetch a file of the results into ``directory``, no longer than announced, whatever the device sends.

    Raises:
        MachineError: it is not the file that was announced.
    """
    path = directory / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as target:
        async with _open(sftp)(str(remote), "rb") as file:
            while (left := entry.size - target.tell()) > 0 and (block := await file.read(min(CHUNK, left))):
                target.write(block)
    if not has(directory, entry):
        path.unlink()
        raise MachineError(
            f"{who}: {entry.path} is not the file that the results list (its sha256 differs).",
            next_step="Run the job again on that device, from nothing.",
        )


def has(directory: Path, entry: FileEntry) -> bool:
    """Return whether a file is there, byte for byte."""
    path = directory / entry.path
    return path.is_file() and path.stat().st_size == entry.size and sha256(path) == entry.sha256


def _open(sftp: asyncssh.SFTPClient) -> Callable[..., Any]:
    # asyncssh types it as text, whatever the mode.
    return sftp.open
