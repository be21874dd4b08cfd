"""A device in a browser: Debian's chromium, driven by Playwright, answers a job in onnxruntime-web.

The page (``browser/``) reads the job from a server on the loopback address and posts each answer as it is found, so
that a later run continues one that ended early. There are two pages one after the other, each in a process of its own:
the first one measures speed and does nothing else, the second one answers.

``wasm`` is ONNX Runtime's own CPU code in WebAssembly with SIMD and threads. ``webgpu`` needs an adapter, and a browser
without one is a failure. ``webgpu-software`` takes Chromium's adapter in software, SwiftShader, on purpose: it shows
that the answers are right and shows nothing about speed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from glmexport.devices.job import JOB, read_job
from glmexport.devices.page_server import serving
from glmexport.devices.posted import Posted
from glmexport.devices.web_limits import check_limits, largest_tensor
from glmexport.devices.web_runtime import SCRIPTS, VERSION, Backend, web_runtime
from glmexport.foundation.errors import BundleError, GlmexportError, InputError, MachineError
from glmexport.foundation.progress import Progress, Track

if TYPE_CHECKING:
    from playwright.sync_api import Browser

Mode = Literal["wasm", "webgpu", "webgpu-software"]

_PAGE = Path(__file__).with_suffix("")
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: Flags for all modes: no first-run pages, and no connection of the browser's own.
_FLAGS = (
    "--headless=new", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
_OF_MODE: dict[Mode, tuple[str, ...]] = {
    "wasm": ("--disable-gpu",),
    "webgpu": ("--enable-unsafe-webgpu", "--enable-features=Vulkan"),
    "webgpu-software": (
        "--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-vulkan=swiftshader",
        "--use-webgpu-adapter=swiftshader",
    ),
}  # fmt: skip
#: The execution provider of each backend.
_PROVIDERS: dict[Backend, str] = {"wasm": "CPUExecutionProvider", "webgpu": "WebGpuExecutionProvider"}
#: Milliseconds between two looks at the page.
_PAUSE_MS = 50


def open_browser(address: str) -> BrowserRunner:
    """Return the browser that ``browser``, ``browser:wasm``, ``browser:webgpu`` or ``browser:webgpu-software`` names.

    Raises:
        InputError: the address names no browser.
        MachineError: the browser, or Playwright, is not installed: raised before the original is asked anything.
    """
    for mode in _OF_MODE:
        if address == f"browser:{mode}" or (address == "browser" and mode == "wasm"):
            runner = BrowserRunner(mode)
            runner.program()
            return runner
    raise InputError(
        f"{address!r} is no browser.",
        next_step=f"Browsers are: {', '.join(f'browser:{mode}' for mode in _OF_MODE)}.",
    )


@dataclass(frozen=True)
class BrowserRunner:
    """The page in ``chromium`` (None: the first one on PATH), with onnxruntime-web from ``runtime`` (None: npm)."""

    mode: Mode = "wasm"
    chromium: Path | None = None
    runtime: Path | None = None

    @property
    def name(self) -> str:
        """The name for messages."""
        return f"browser:{self.mode}"

    def __call__(self, job: Path, results: Path, progress: Progress) -> None:
        """Let the device answer the job; see ``Runner``.

        Raises:
            InputError: the bundle is for another provider, or more than a browser holds.
            BundleError: a file is not the job's, or onnxruntime-web refuses a graph.
            MachineError: no browser, no runtime, no adapter, no memory; or the page ended before it was done.
        """
        definition, backend = read_job(job), self._backend
        wanted = definition.provider.name
        if wanted != _PROVIDERS[backend]:
            raise InputError(
                f"{self.name}: the bundle runs on {wanted}, and this device has {_PROVIDERS[backend]}.",
                next_step="Take a bundle of the device's class, or another device.",
            )
        check_limits(job, definition)
        posted = Posted(job, definition, results, self.mode)
        if posted.complete:
            return
        resources: dict[str, Path | bytes] = {
            "page.html": _PAGE / "page.html",
            "device.js": _PAGE / "device.js",
            **{f"runtime/{name}": content for name, content in web_runtime(backend, self.runtime).items()},
            f"job/{JOB}": job / JOB,
            **{f"job/{entry.path}": job / entry.path for entry in definition.files},
        }
        settings = {
            "provider": backend,
            "runtime": SCRIPTS[backend],
            "job_digest": posted.job_digest,
            "largest_tensor": largest_tensor(job, definition),
        }
        resources["settings.json"] = json.dumps(settings).encode()
        events: SimpleQueue[dict[str, Any]] = SimpleQueue()

        def receive(name: str, body: bytes) -> bytes:
            event, reply = posted.receive(name, body)
            events.put(event)
            return reply

        with serving(resources, posted.accepted, receive) as server, self._launched(progress) as browser:
            posted.browser = f"Chromium {browser.version}"
            for part in posted.parts:
                posted.part = part
                counts = {"round": 1, "answers": len(posted.left("answers")), "tokens": len(posted.left("tokens"))}
                with _Shown(progress, counts) as shown:
                    self._visit(browser, f"{server.url}page.html", events, shown)
        posted.finish()

    @property
    def _backend(self) -> Backend:
        return "wasm" if self.mode == "wasm" else "webgpu"

    def program(self) -> Path:
        """Return the path of the browser's program.

        Raises:
            MachineError: there is none, or Playwright is missing.
        """
        try:
            import playwright.sync_api  # noqa: F401
        except ImportError as error:
            raise MachineError(
                f"{self.name}: Playwright, which drives the browser, is missing.",
                next_step="Run: pip install 'glmexport[browser]'.",
            ) from error
        path = self.chromium or next(map(Path, filter(None, map(shutil.which, _NAMES))), None)
        if path is None:
            raise MachineError(
                f"{self.name}: there is no Chromium on PATH.",
                next_step="Install it: on Debian, apt-get install chromium.",
            )
        return path

    @contextmanager
    def _launched(self, progress: Progress) -> Iterator[Browser]:
        """Yield the browser with an empty profile of its own, which is removed with it."""
        path = self.program()
        from playwright.sync_api import Error, sync_playwright

        # Root has no sandbox in Chromium.
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        if root:
            progress.remark("Chromium runs without its sandbox, since glmexport runs as root.")
        with sync_playwright() as playwright:
            try:
                browser = playwright.chromium.launch(
                    executable_path=path, args=[*_FLAGS, *_OF_MODE[self.mode]], chromium_sandbox=not root
                )
            except Error as error:
                raise MachineError(
                    f"{self.name}: {path} cannot be started: {_first_line(error)}.",
                    next_step="Try to start it by hand, or give another one.",
                ) from error
            try:
                yield browser
            finally:
                browser.close()

    def _visit(self, browser: Browser, url: str, events: SimpleQueue[dict[str, Any]], shown: _Shown) -> None:
        """Show one page until it says that it is done.

        Raises:
            BundleError: a file is not the job's, or onnxruntime-web refuses a graph.
            MachineError: anything else that went wrong, or the page's process ended.
        """
        from playwright.sync_api import Error

        context = browser.new_context()
        page, ended = context.new_page(), []
        page.on("crash", lambda _: ended.append("the page's process ended"))
        page.on("pageerror", lambda error: ended.append(str(error)))
        try:
            page.goto(url)
            while not ended:
                page.wait_for_timeout(_PAUSE_MS)
                shown.look()
                while not events.empty():
                    event = events.get()
                    if event["kind"] == "finished":
                        return
                    if event["kind"] == "failed":
                        raise self._failure(event)
                    shown.show(event)
        except Error as error:
            ended.append(_first_line(error))
        finally:
            # A browser that has ended has nothing to close.
            with suppress(Error):
                context.close()
        raise MachineError(
            f"{self.name}: the page ended before it was done: {ended[0]}. Often there was too little memory.",
            next_step="Run the same command again: it goes on with what is not answered yet.",
        )

    def _failure(self, event: dict[str, Any]) -> GlmexportError:
        reason = str(event["reason"]).strip().rstrip(".")
        match event["stage"]:
            case "files":
                return BundleError(f"{self.name}: {reason}.", next_step="Copy the bundle again, or build it again.")
            case "graph":
                return BundleError(
                    f"{self.name}: onnxruntime-web {VERSION} failed {event['words']}: {reason}.",
                    next_step="Build it for a target that this runtime runs: wasm or webgpu.",
                )
            case "adapter":
                return MachineError(
                    f"{self.name}: {reason}.",
                    next_step="Take a machine with a GPU and its Vulkan driver; browser:webgpu-software shows, without "
                    "one, that answers are right.",
                )
        return MachineError(
            f"{self.name}: the page failed {event['words']}: {reason}.",
            next_step="Run the same command again: it goes on with what is not answered yet.",
        )


class _Shown:
    """Events shown as bars, one after the other."""

    _LABELS: ClassVar = {"round": "Speed", "tokens": "Free answers", "answers": "Texts"}

    def __init__(self, progress: Progress, counts: Mapping[str, int]) -> None:
        self._progress, self._counts = progress, counts
        self._stack, self._kind, self._done = ExitStack(), "", 0
        self._track: Track | None = None

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one more of the event's kind."""
        kind = event["kind"]
        if kind not in self._LABELS:
            return
        if kind != self._kind:
            self._stack.close()
            self._kind, self._done = kind, 0
            self._track = self._stack.enter_context(self._progress.track(self._LABELS[kind], self._counts[kind]))
        assert self._track is not None
        self._done += 1
        self._track.advance(int(self._done <= self._counts[kind]), f"round {self._done}" if kind == "round" else "")

    def look(self) -> None:
        """Raise if nobody waits for the answers any more."""
        if self._track is not None:
            self._track.advance(0)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
