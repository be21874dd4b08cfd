"""The user's cache folder, and small documents in it that many processes read and change.

Whatever is in it can be removed at any time: it spares work, and no result depends on it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from filelock import FileLock, Timeout

from glmexport.foundation.definition import Definition, parse_json
from glmexport.foundation.errors import MachineError
from glmexport.foundation.untrusted import SMALL, open_regular

#: Seconds to wait for another process that changes the same document, which takes milliseconds.
_WAIT = 10

Content = TypeVar("Content", bound=Definition)


def cache_folder() -> Path:
    """Return the user's folder for files that can be made again: ``$XDG_CACHE_HOME/glmexport``, or in ``~/.cache``.

    A relative path there is ignored, as the XDG Base Directory Specification says.

    Raises:
        MachineError: the user has no home directory, and no other folder is named.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if base.is_absolute():
        return base / "glmexport"
    try:
        return Path.home() / ".cache" / "glmexport"
    except RuntimeError as error:
        raise MachineError(
            f"There is no folder for cached files: {error}", next_step="Set XDG_CACHE_HOME to a folder."
        ) from error


class CacheFile(Generic[Content]):
    """A document in the cache folder: read without a lock, changed by one process at a time, and never half written.

    Args:
        name: the name of its file; a new form of the document has a new name.
        empty: the content of a document that is not there.
    """

    def __init__(self, name: str, empty: Content) -> None:
        self._name = name
        self._empty = empty

    @property
    def path(self) -> Path:
        """The place of the document; raises as ``cache_folder``."""
        return cache_folder() / self._name

    def read(self) -> Content:
        """Return the content; the empty one where nothing is, or nothing that can be relied on.

        That is a damaged file, one of another form, and one that others than this user may have written.
        """
        try:
            file, size = open_regular(self.path)
            with file:
                if size > SMALL.size or not _is_own(os.fstat(file.fileno())):
                    return self._empty
                return parse_json(type(self._empty), file.read(SMALL.size + 1), SMALL)
        except (OSError, ValueError, MachineError):
            return self._empty

    def change(self, edit: Callable[[Content], Content]) -> None:
        """Replace the content by what ``edit`` makes of it.

        Raises:
            MachineError: it cannot be written; says where.
        """
        path = self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(path.name + ".lock"), timeout=_WAIT):
                content = edit(self.read()).model_dump_json().encode()
                # A name of its own, and for this user's eyes only: a lock may not hold on every file system.
                descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
                try:
                    with os.fdopen(descriptor, "wb") as file:
                        file.write(content)
                    Path(partial).replace(path)
                except BaseException:
                    Path(partial).unlink(missing_ok=True)
                    raise
        except Timeout as error:
            raise MachineError(
                f"{path} is held by another process.", next_step=f"Remove {path}.lock if there is none."
            ) from error
        except OSError as error:
            raise MachineError(
                f"{path} cannot be written: {error.strerror or error}.",
                next_step="Make its folder writable, or set XDG_CACHE_HOME to one that is.",
            ) from error


def _is_own(status: os.stat_result) -> bool:
    """Return whether only this user can have written a file; systems without such owners are not asked."""
    return not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)
