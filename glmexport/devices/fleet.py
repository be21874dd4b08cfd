"""Several devices: their names, the ways to reach them, and all of them at work side by side."""

from __future__ import annotations

import hashlib
import importlib
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from glmexport.devices.emulated import QEMU_ARM64, open_emulated
from glmexport.devices.kit import KIT, KIT_RESULT, KitResultRunner
from glmexport.devices.local import LocalRunner
from glmexport.devices.ssh import SshRunner, open_ssh
from glmexport.foundation.definition import Definition, read_toml
from glmexport.foundation.errors import DefinitionError, GlmexportError, InputError
from glmexport.foundation.progress import Progress, Track
from glmexport.wire.runner import Runner
from glmexport.wire.ssh import SCHEME

#: Every form of the argument DEVICE, for messages.
FORMS = f"local, {SCHEME}user@host, {QEMU_ARM64}, browser, {KIT}FILE.zip, {KIT_RESULT}FILE.zip"
BROWSER = "browser"
_OF_SSH = ("key", "known_hosts", "python", "work", "reconnects", "silence")


class FleetDevice(Definition):
    """One device of a fleet file."""

    #: The address, as --device takes it.
    at: str
    #: The class of the device, all devices of which share a column of the report; by default each is its own class.
    device_class: str | None = Field(default=None, alias="class", min_length=1)
    #: This and the following are for devices behind SSH. Files are relative to the fleet file.
    key: Path | None = None
    known_hosts: Path | None = None
    #: A Python with numpy and onnxruntime on the device, relative to the user's home.
    python: str | None = None
    #: The work directory on the device, relative to the user's home.
    work: str | None = None
    #: Number of times that a lost connection is opened again.
    reconnects: int | None = Field(default=None, ge=0)
    #: Seconds without a message after which the device is given up.
    silence: float | None = Field(default=None, gt=0)


class Fleet(Definition):
    """The content of a fleet file."""

    devices: dict[str, FleetDevice] = Field(min_length=1)


@dataclass(frozen=True)
class Member:
    """A device that is ready to be asked."""

    name: str
    device_class: str
    runner: Runner

    @property
    def here(self) -> bool:
        """Whether the device uses this machine's processor."""
        return not isinstance(self.runner, (SshRunner, KitResultRunner))

    @property
    def folder(self) -> str:
        """The name of the folder for its files alone."""
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9-]+', '_', self.name)[:40]}-{digest}"


def open_fleet(path: Path) -> list[Member]:
    """Return the devices of a fleet file.

    Raises:
        DefinitionError: there is no such file, or it has a key that is unknown or of another kind of device.
        InputError: an address is that of no device.
    """
    if not path.is_file():
        raise DefinitionError(f"There is no fleet file {path}.", next_step="Give a .toml file (README, 'Fleet').")
    members = []
    for name, device in read_toml(path, Fleet).devices.items():
        given: dict[str, Any] = {key: value for key in _OF_SSH if (value := getattr(device, key)) is not None}
        if given and not device.at.startswith(SCHEME):
            raise DefinitionError(
                f"{path}: devices.{name}: {next(iter(given))} belongs to devices at {SCHEME}...",
                next_step="Correct the key.",
            )
        for key in ("key", "known_hosts"):
            if key in given:
                given[key] = path.parent / given[key].expanduser()
        members.append(Member(name, device.device_class or name, open_device(device.at, name, **given)))
    return members


def open_device(address: str, name: str | None = None, **options: Any) -> Runner:
    """Return the way to a device as --device names it; ``options`` are those of one behind SSH.

    Raises:
        InputError: there is no such kind of device.
    """
    kind, _, rest = address.partition(":")
    if address == "local":
        return LocalRunner(name=name or address)
    if address.startswith(SCHEME):
        return open_ssh(address, name, **options)
    if kind == QEMU_ARM64:
        return open_emulated(Path(rest) if rest else None, name or QEMU_ARM64)
    if address.startswith(KIT_RESULT) and rest:
        return KitResultRunner(name or address, Path(rest))
    if address.startswith(BROWSER):
        return _browser(address)
    raise InputError(f"{address!r} is no kind of device.", next_step=f"Devices are: {FORMS}.")


def _browser(address: str) -> Runner:
    browser = importlib.import_module("glmexport.devices.browser")
    runner: Runner = browser.open_browser(address)
    return runner


def ask(members: Sequence[Member], job: Path, results: Path, progress: Progress) -> dict[str, GlmexportError]:
    """Let every device answer the job into its own folder below ``results``; return the errors of those that failed.

    They work side by side, each in a thread, but those on this machine one after the other: they would slow each other
    down. A device that fails stops no other; any other exception ends all.
    """
    for member in members:
        (results / member.folder).mkdir(parents=True, exist_ok=True)
    if len(members) == 1:
        failure = _asked(members[0], job, results, progress, nullcontext())
        return {members[0].name: failure} if failure else {}
    failures: dict[str, GlmexportError] = {}
    shared, here = _Shared(progress), threading.Lock()
    with progress.track("Devices", len(members)) as track, ThreadPoolExecutor(len(members)) as pool:
        shared.bar = track
        futures = {
            pool.submit(
                _asked, member, job, results, _Watched(shared, member.name), here if member.here else nullcontext()
            ): member
            for member in members
        }
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when="FIRST_COMPLETED")
                for future in done:
                    failure = future.result()
                    if failure:
                        failures[futures[future].name] = failure
                    shared.finished(futures[future].name, failure)
        except BaseException:
            # A device that is still at work ends the next time it reports progress.
            shared.stopped.set()
            raise
    return failures


def _asked(
    member: Member, job: Path, results: Path, progress: Progress, turn: AbstractContextManager[Any]
) -> GlmexportError | None:
    try:
        with turn:
            member.runner(job, results / member.folder, progress)
    except GlmexportError as error:
        return error
    return None


class _Stopped(Exception):
    """Raised in a thread whose device nobody waits for any more."""


class _Shared:
    """One bar for all devices; their threads report to it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self.bar: Track | None = None
        self.stopped = threading.Event()

    def tell(self, text: str) -> None:
        """Show the present work of one device."""
        if self.stopped.is_set():
            raise _Stopped
        with self._lock:
            assert self.bar is not None
            self.bar.advance(0, text)

    def remark(self, text: str) -> None:
        """Show a line of its own."""
        with self._lock:
            self._progress.remark(text)

    def finished(self, name: str, failure: GlmexportError | None) -> None:
        """Count a device that has finished or failed."""
        with self._lock:
            assert self.bar is not None
            self.bar.advance(1, name)
            if failure:
                self._progress.remark(f"{failure.message} {failure.next_step}")


class _Watched:
    """The progress of one of several devices."""

    def __init__(self, shared: _Shared, name: str) -> None:
        self._shared, self._name = shared, name

    def track(self, label: str, total: int) -> AbstractContextManager[Track]:
        """Return a track whose steps are shown beside the bar of all."""
        return self._track(label, total)

    @contextmanager
    def _track(self, label: str, total: int) -> Iterator[Track]:
        yield _Told(self._shared, f"{self._name}: {label}", total)

    def remark(self, text: str) -> None:
        """Show a line of its own."""
        self._shared.remark(text)


class _Told:
    def __init__(self, shared: _Shared, label: str, total: int) -> None:
        self._shared, self._label, self._total, self._done = shared, label, total, 0

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._done += steps
        self._shared.tell(f"{self._label} {self._done}/{self._total}")
