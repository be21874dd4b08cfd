"""The files of a server that is deployed to, all below one root::

    releases/NAME/    a release: whole, verified, and never changed again
    current           a link to the release that is served
    incoming/SHA256   files on their way, whole or partial
    files/NAME.json   what a release consists of
    orders/ID.json    what a deployment asks for; ID.events, what became of it
    ledger.jsonl      everything that was done, each line chained to the one before
    trust.pem         the key, or the root certificate, that releases are signed with
    lock              held by whatever changes any of these
    sending           held by who sends: what two send at once is in one folder

What has a name there was written and is on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glmexport.wire.standalone import Failure, replace, sha256

NAME = re.compile(r"[0-9a-f]{32}")
#: Begins the first line of trust.pem where a certificate has to be of somebody in particular.
SUBJECT = "glmexport-subject: "
#: Prefix of what is no release any more, until it is gone.
_GONE = ".gone-"
#: Prefix of a release that is not whole yet.
_PARTIAL = ".partial-"
#: Seconds for which somebody may ask for the outcome of an order.
_ASKED_S = 30 * 24 * 3600
#: Seconds for which one deployment waits for another.
PATIENCE_S = 600.0


class Root:
    """The folder that everything is kept below."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.releases, self.incoming = path / "releases", path / "incoming"
        self.orders, self.files = path / "orders", path / "files"
        self.link, self.ledger, self.trust = path / "current", path / "ledger.jsonl", path / "trust.pem"

    def make(self) -> None:
        """Create the folders that are not there yet."""
        for folder in (self.releases, self.incoming, self.orders, self.files):
            folder.mkdir(parents=True, exist_ok=True)

    def release(self, name: str) -> Path:
        """Return the folder of a release.

        Raises:
            Failure: ``name`` is none.
        """
        if not NAME.fullmatch(name):
            raise Failure("files", f"{name!r} is no name of a release.", "Give one that status lists.")
        return self.releases / name

    def partial(self, name: str) -> Path:
        """Return the folder in which a release is put together."""
        return self.release(name).with_name(_PARTIAL + name)

    def names(self) -> list[str]:
        """Return the names of every release that is whole."""
        if not self.releases.is_dir():
            return []
        return sorted(path.name for path in self.releases.iterdir() if NAME.fullmatch(path.name) and path.is_dir())

    def current(self) -> str | None:
        """Return the name of the release that is served; None: none yet.

        Raises:
            Failure: ``current`` is something else.
        """
        if not os.path.lexists(self.link):
            return None
        target = str(self.link.readlink()) if self.link.is_symlink() else ""
        folder, _, name = target.partition("/")
        if folder != "releases" or not NAME.fullmatch(name):
            raise Failure(
                "files", f"{self.link} is no link to a release.", "Somebody else made it; move it out of the way."
            )
        return name

    def switch(self, name: str | None) -> None:
        """Let ``current`` be another release, or none: also after a crash it is the former or the new one."""
        if name is None:
            with contextlib.suppress(FileNotFoundError):
                self.link.unlink()
        else:
            assert self.release(name).is_dir()
            new = self.link.with_name("current.new")
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
            new.symlink_to(f"releases/{name}")
            new.replace(self.link)
        synchronize(self.path)

    def keep(self, name: str) -> None:
        """Give a partial release, all of which is verified, its name."""
        partial, whole = self.partial(name), self.release(name)
        for folder, _, files in os.walk(partial):
            for file in files:
                path = Path(folder) / file
                path.chmod(0o444)
                synchronize(path)
            synchronize(Path(folder))
        partial.rename(whole)
        synchronize(self.releases)

    def remove(self, name: str) -> None:
        """Remove a release; what a crash leaves of it is none any more, and goes the next time."""
        self.release(name).rename(self.releases / (_GONE + name))
        self.clear()
        with contextlib.suppress(FileNotFoundError):
            (self.files / f"{name}.json").unlink()

    def clear(self) -> None:
        """Remove what is left of removed releases, and of those that were never whole; nobody puts one together."""
        for path in (*self.releases.glob(_GONE + "*"), *self.releases.glob(_PARTIAL + "*")):
            shutil.rmtree(path)

    def clear_orders(self) -> None:
        """Remove orders of which nobody asks any more, and what was half written of them."""
        for path in (*self.orders.iterdir(), *self.path.glob("*.partial")) if self.orders.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ASKED_S:
                    path.unlink()

    def listed(self) -> dict[tuple[str, int], Path]:
        """Yield where a file of some SHA-256 and size is in a release, as far as their lists say."""
        found = {}
        for name in self.names():
            path = self.files / f"{name}.json"
            if path.is_file():
                for entry in json.loads(path.read_text("utf-8")):
                    found[entry["sha256"], entry["size"]] = self.release(name) / entry["path"]
        return found

    def held(self, entry: dict[str, Any], listed: dict[tuple[str, int], Path]) -> Path | None:
        """Return a file with the content of ``entry``, byte for byte; None where there is none."""
        candidates: list[Path | None] = [self.incoming / entry["sha256"], listed.get((entry["sha256"], entry["size"]))]
        for path in candidates:
            if path and path.is_file() and path.stat().st_size == entry["size"] and sha256(path) == entry["sha256"]:
                return path
        return None

    @contextlib.contextmanager
    def alone(self, patience_s: float = 0, lock: str = "lock") -> Iterator[None]:
        """Hold ``lock``, so that nobody else who holds it acts meanwhile; ``lock`` itself is for all that changes.

        Raises:
            Failure: somebody does, and ``patience_s`` later still.
        """
        import fcntl

        until = time.monotonic() + patience_s
        with (self.path / lock).open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise Failure(
                            "busy", f"Another deployment is at work in {self.path}.", "Wait for it; see status."
                        ) from None
                    time.sleep(0.2)
            # Not inherited by what is started meanwhile, which may outlive this.
            os.set_inheritable(file.fileno(), False)
            yield


def synchronize(path: Path) -> None:
    """Have a file's or a folder's content on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def contained(path: str) -> bool:
    """Return whether a name stays in the folder that it is relative to."""
    parts = path.split("/")
    return bool(path) and "\0" not in path and "\\" not in path and all(part not in ("", ".", "..") for part in parts)


def write_json(path: Path, value: object) -> None:
    """Replace a file by a JSON document, all of it or nothing."""
    replace(path, [(json.dumps(value, indent=1) + "\n").encode()])
