"""Files of a checkpoint directory: checked to be readable and inside of it, and JSON of one meaning."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from glmexport.foundation.errors import CheckpointError, GlmexportError, MachineError
from glmexport.foundation.untrusted import LARGE, parse_object, read_regular

#: A config is kilobytes, and the largest tokenizer_config and shard index are a few megabytes, with a key for every
#: tensor. What transformers reads of a key that is not needed here may be infinite.
JSON_LIMITS = replace(LARGE, keys=500_000, nonfinite=True)

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


def unreadable(path: Path, error: OSError) -> GlmexportError:
    """Return the error to raise for ``error`` met at ``path``.

    Returns:
        CheckpointError if the path names no readable kind of file, MachineError if the machine refuses it.
    """
    reason = error.strerror or type(error).__name__
    if error.errno in _ABSENT:
        return CheckpointError(
            f"{path} cannot be read: {reason}.",
            next_step="Download the checkpoint again, or correct the path.",
        )
    return MachineError(
        f"{path} cannot be read: {reason}.",
        next_step="Check its permissions and the disk it lies on, then run the command again.",
    )


def contained(directory: Path, name: str, named_by: str) -> Path:
    """Return the existing regular file ``name`` below ``directory``.

    A symbolic link is followed as long as it ends in ``directory`` or, for a snapshot in the hub's cache, in
    that repository's folder or in the blob store its cache shares between repositories.

    Args:
        directory: The checkpoint.
        name: Relative POSIX path, as written in a file of the checkpoint.
        named_by: What gave the name, for the message.

    Raises:
        CheckpointError: the name leaves the directory, or names no regular file.
    """
    refuse_escape(directory, name, named_by)
    path = directory / name
    try:
        target = path.resolve()
        inside = is_inside(target, directory)
        present = path.is_file()
    except OSError as error:
        raise unreadable(path, error) from error
    except RuntimeError as error:  # What Python 3.11 makes of a loop of links.
        raise CheckpointError(
            f"{path} cannot be followed: {error}.", next_step="Replace the link with the file it stands for."
        ) from error
    if not inside:
        raise CheckpointError(
            f"{path} is a link to {target}, outside of the checkpoint.",
            next_step=f"Copy the directory with the files that its links stand for (cp -rL {directory} COPY), and give "
            "the copy.",
        )
    if not present:
        what = "is a link to a file that does not exist" if path.is_symlink() else "is not an existing file"
        raise CheckpointError(f"{path}, named by {named_by}, {what}.", next_step="Download the checkpoint again.")
    return path


def optional(directory: Path, name: str, named_by: str) -> Path | None:
    """Return a file as ``contained`` does, or None where nothing of that name exists, not even a broken link."""
    path = directory / name
    try:
        path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    return contained(directory, name, named_by)


def refuse_escape(directory: Path, name: str, named_by: str) -> None:
    """Check the text of a relative path, without looking at the disk.

    Raises:
        CheckpointError: absolute, upwards, of another operating system, or not printable.
    """
    pure = PurePosixPath(name)
    foreign = "\\" in name or PureWindowsPath(name).drive
    if not name or not name.isprintable() or foreign or pure.is_absolute() or ".." in pure.parts:
        raise CheckpointError(
            f"{named_by} names {name!r}, which is not a relative path inside {directory}.",
            next_step="Do not use this checkpoint unless you trust where it came from; download it again.",
        )


def is_inside(path: Path, directory: Path) -> bool:
    """Return whether ``path``, its links followed, lies in ``directory`` or where the hub's cache keeps its files."""
    target = path.resolve()
    return any(target.is_relative_to(allowed) for allowed in _roots(directory.resolve()))


def _roots(root: Path) -> list[Path]:
    repository = cache_repository(root)
    return [root] if repository is None else [root, repository, repository.parent / "blobs"]


def cache_repository(directory: Path) -> Path | None:
    """Return the ``models--owner--name`` folder of a snapshot in the hub's cache; None for any other directory."""
    repository = directory.parent.parent
    in_cache = directory.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if in_cache else None


def source_name(directory: Path) -> str:
    """Return the hub id of a snapshot in the hub's cache; for any other directory its own name."""
    repository = cache_repository(directory.resolve())
    if repository is None:
        return directory.resolve().name
    return repository.name.removeprefix("models--").replace("--", "/", 1)


def version(path: Path) -> tuple[int, int, int]:
    """Return size, time of the last change and inode of a file, which tell that it was written again or replaced.

    Raises:
        CheckpointError: it vanished.
        MachineError: the machine does not let us look.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return status.st_size, status.st_mtime_ns, status.st_ino


def json_object(data: bytes) -> dict[str, object]:
    """Parse UTF-8 JSON whose top level is an object.

    Raises:
        ValueError: not UTF-8, not JSON, not an object, beyond ``JSON_LIMITS``, or a key given twice; its text
            completes the sentence "FILE is not usable: ...".
    """
    return parse_object(data, JSON_LIMITS)


def read_json(path: Path) -> dict[str, object]:
    """Return the JSON object in ``path``.

    Raises:
        CheckpointError: absent, no regular file, beyond ``JSON_LIMITS``, or not one JSON object; names the file and
            the place.
        MachineError: present but the machine does not let us read it.
    """
    try:
        return json_object(read_regular(path, JSON_LIMITS.size))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not usable: {error}.", next_step="Correct the file, or download it again."
        ) from error


def read_text(path: Path, most: int) -> str:
    """Return the UTF-8 text of at most ``most`` bytes in ``path``.

    Raises:
        CheckpointError: absent, no regular file, larger, or not UTF-8.
        MachineError: present but the machine does not let us read it.
    """
    try:
        return read_regular(path, most).decode("utf-8")
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8: {error}.", next_step="Correct the file, or download it again."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not usable: {error}.", next_step="Correct the file, or download it again."
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: a reader, or a crash, sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def listed(names: list[str], shown: int = 3) -> str:
    """Return the first of ``names`` as one text, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
