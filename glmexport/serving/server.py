"""A server that is made of a bundle and options, and ends when it is told to."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.genai_config import GenaiConfig
from glmexport.bundle.manifest import MANIFEST
from glmexport.foundation.errors import GlmexportError, InputError, MachineError
from glmexport.foundation.progress import Progress, Silent
from glmexport.release.opening import NOBODY, Trust, open_signed
from glmexport.serving.app import ServedBundle, Service
from glmexport.serving.guard import AccessRules, Guard
from glmexport.serving.guides import Guides
from glmexport.serving.limits import ServingLimits
from glmexport.serving.listen import (
    HttpServer,
    inherited_socket,
    most_connections,
    notify,
    own_socket,
    reached_from_outside,
    url_of,
    watchdog_s,
)
from glmexport.serving.log import described
from glmexport.serving.metrics import Metrics
from glmexport.serving.orders import RequestReader
from glmexport.serving.scheduler import Scheduler, SchedulerOptions

#: Fewest characters of a key: a shorter one can be guessed.
_KEY_CHARACTERS = 16
#: Number of connections beside those whose requests run or wait.
_SPARE = 8
#: Seconds that the engine has to end its step once nobody waits for it.
_LAST_STEP_S = 1.0


@dataclass(frozen=True)
class ServeOptions:
    """The options of a server. ``threads`` None: as many as the bundle's target says, else ``cores``."""

    cores: int
    threads: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    name: str | None = None
    hosts: tuple[str, ...] = ()
    drain_s: float = 30
    lenient: bool = False
    parallel: int = 4
    waiting: int = 64
    guesses: int = 0
    reuse: bool = True
    batch: bool = False
    #: The signers of whom one must have signed the bundle.
    trust: Trust = NOBODY
    limits: ServingLimits = field(default_factory=ServingLimits)


@dataclass(frozen=True)
class Serving:
    """The facts about a server that is ready."""

    url: str
    name: str
    digest: str
    threads: int
    inherited: bool


def serve(
    bundle: Path, options: ServeOptions, told: Callable[[Serving], None], progress: Progress | None = None
) -> bool:
    """Answer requests until SIGTERM or SIGINT; ``told`` is called once the model is in memory.

    Returns: whether the threads that compute and read have ended; if not, the process should not be torn down.

    Raises:
        InputError: the bundle, the key file or the address cannot be used.
        UnverifiedError: the bundle is not what was signed, or nobody of ``options.trust`` signed it.
        MachineError: the address is taken, or the model cannot be run here.
    """
    # The target of a link may change while files are opened one after the other.
    directory = Path(os.path.realpath(bundle))
    keys = read_keys(options.key_file, os.environ) if options.key_file else ()
    inherited = inherited_socket(os.environ)
    listener = inherited or own_socket(options.host, options.port)
    with listener:
        if reached_from_outside(listener) and not keys:
            raise InputError(
                f"{url_of(listener)} can be reached from other machines, and there is no key.",
                next_step="Give --api-key-file, or listen on 127.0.0.1.",
            )
        opened = open_signed(directory, options.trust, progress or Silent())
        return _Served(opened, options, keys, listener, inherited is not None).run(told)


class _Served:
    """The parts of a server, put together."""

    def __init__(
        self,
        bundle: Bundle,
        options: ServeOptions,
        keys: tuple[bytes, ...],
        listener: socket.socket,
        inherited: bool,
    ) -> None:
        manifest = bundle.manifest
        self._threads = options.threads or manifest.target.session.threads or options.cores
        self._serving = Serving(
            url_of(listener), options.name or manifest.source.name, bundle.digest, self._threads, inherited
        )
        config = None if options.batch or not isinstance(bundle.loop, GenaiConfig) else bundle.loop
        self._guides = Guides(bundle.directory, config) if config else None
        reader = RequestReader(
            bundle.tokenizer, bundle.ends, bundle.context_length, options.limits, config is not None, options.lenient
        )
        # This happens while the bundle is loaded.
        Thread(target=reader.prepare, daemon=True).start()
        metrics = Metrics()
        at_work = options.parallel + options.waiting
        limits = replace(options.limits, connections=max(options.limits.connections, at_work + _SPARE))
        # With fewer connections fewer requests wait: some are left for checks whether the server lives.
        waiting = min(options.waiting, max(1, most_connections(limits) - options.parallel - _SPARE))
        settings = SchedulerOptions(
            self._threads, options.parallel, waiting, options.guesses, options.reuse, options.batch
        )
        self._scheduler = Scheduler(bundle, settings, metrics, self._loaded, self._broken, self._guides)
        facts = ServedBundle(
            name=self._serving.name,
            directory=bundle.name,
            digest=self._serving.digest,
            family=manifest.family,
            target=manifest.target.name,
            context_length=bundle.context_length,
            created=int(bundle.path(MANIFEST).stat().st_mtime),
        )
        self._service = Service(facts, reader, self._scheduler, metrics, self._guides)
        hosts = {host.lower() for host in options.hosts}
        if options.host not in ("0.0.0.0", "::"):  # noqa: S104
            hosts.add(options.host.lower())
        self._guard = Guard(self._service.application(), AccessRules(keys, frozenset(hosts)), metrics)
        self._server = HttpServer(
            self._guard,
            listener,
            inherited=inherited,
            limits=limits,
            drain_s=options.drain_s,
            draining=self._drain,
            give_up=self._service.give_up,
        )
        self._error: Exception | None = None

    def run(self, told: Callable[[Serving], None]) -> bool:
        """Serve until the server has ended."""
        self._told = told
        asyncio.run(self._run())
        if isinstance(self._error, (GlmexportError, MemoryError, OSError)):
            raise self._error
        if self._error:
            # A library's message may be about a request.
            raise RuntimeError(f"The thread that computes failed: {described(self._error)}.") from None
        return self._scheduler.join(_LAST_STEP_S) and not self._service.reading

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._scheduler.start()
        alive = asyncio.create_task(self._tell_alive())
        try:
            await self._server.listen()
        finally:
            alive.cancel()
            self._service.close()
            self._scheduler.close()
            if self._guides:
                self._guides.close()

    async def _tell_alive(self) -> None:
        """Tell systemd's watchdog that this loop goes round, and that the thread that computes is there."""
        every_s = watchdog_s()
        while every_s and self._scheduler.alive:
            notify("WATCHDOG=1")
            await asyncio.sleep(every_s)

    def _loaded(self) -> None:
        # If the loop has ended, nobody is to be told.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        notify("READY=1")
        self._told(self._serving)

    def _broken(self, error: Exception) -> None:
        self._error = error
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._server.stop)

    def _drain(self) -> None:
        notify("STOPPING=1")
        self._service.draining = self._guard.closing = True


def read_keys(path: Path, environment: Mapping[str, str]) -> tuple[bytes, ...]:
    """Return the keys in a file, one a line; there may be several, so that a key can be changed without a pause.

    Raises:
        InputError: others can read the file, or it has no key, or one that is too short or no plain text.
        MachineError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            # These are the facts of the opened file, and not of one that may be in its place by now.
            _check_secret(path, status, environment)
            lines = stream.read(1 << 16).splitlines()
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror}.", next_step="Check its permissions.") from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys or any(len(key) < _KEY_CHARACTERS or not key.isascii() or b" " in key for key in keys):
        raise InputError(
            f"{path} has no key, or one that is not {_KEY_CHARACTERS} or more ASCII characters without spaces.",
            next_step="Write one with: openssl rand -hex 32.",
        )
    return keys


def _check_secret(path: Path, status: os.stat_result, environment: Mapping[str, str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is no file.", next_step="Give a file with the key in it.")
    # systemd guards its credentials by an access list, whose mask is where the group's rights are.
    credentials = environment.get("CREDENTIALS_DIRECTORY")
    listed = credentials is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(credentials))
    if status.st_mode & (0o007 if listed else 0o077):
        raise InputError(f"{path} can be read by others.", next_step=f"chmod 600 {path}")
    if status.st_uid not in (0, os.geteuid()):
        raise InputError(f"{path} belongs to another user.", next_step="Make it yours, or root's.")
