"""The switch from one release to another and, where that one does not answer as it should, back.

At every moment ``current`` is a whole and verified release. What is killed in between is found in the ledger as a
switch without an end, and taken back by whatever comes next.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from glmexport.wire.server.answering import Endpoint, check_golden, wait_until_ready
from glmexport.wire.server.layout import Root
from glmexport.wire.server.ledger import BACK, CONFIRMED, REFUSED, SWITCHING, Ledger
from glmexport.wire.server.verifying import VerifiedRelease, verify_release
from glmexport.wire.standalone import Failure, Tell

_PR_SET_PDEATHSIG = 1
#: Seconds for a command that restarts the server, and for one that is told to end.
_RESTART_S, _END_S = 120, 30


class Activation:
    """The execution of ``order`` below ``root``, which nobody else changes meanwhile."""

    def __init__(self, root: Root, order: dict[str, Any], tell: Tell) -> None:
        self.root, self.order, self.tell = root, order, tell
        self.ledger = Ledger(root.ledger)
        self.endpoint = Endpoint(order["host"], order["port"], order["api_key_file"])

    def activate(self) -> None:
        """Serve the order's release.

        Raises:
            Failure: it is refused, or was taken back.
        """
        name = self.order["release"]
        self.recover()
        release = self._verified(name)
        if release.counter < self.ledger.counter and not self.order["allow_older"]:
            self._refuse(
                name,
                f"The release has the counter {release.counter}, and {self.ledger.counter} has been served here: "
                "it is an older one.",
                "Deploy the newest one. To go back on purpose, use rollback, or --allow-older.",
            )
        former = self.root.current()
        if former == name and not self._wrong(release):
            self.tell({"event": "unchanged", "release": name})
            return
        self._smoke(name, release)
        self._change(name, former, release, self.order["reason"])

    def roll_back(self, name: str | None) -> None:
        """Serve a former release: ``name``, or the one that was confirmed last before the present one.

        Raises:
            Failure: there is none, or it does not answer as it should.
        """
        self.recover()
        current = self.root.current()
        held = [each for each in self.ledger.confirmed() if each in self.root.names() and each != current]
        if name is None and not held:
            raise Failure("files", "There is no former release here that was served.", "Deploy one.")
        chosen = name or held[-1]
        if chosen not in self.root.names():
            raise Failure("files", f"There is no release {chosen} here.", "Give one that status lists.")
        self._change(chosen, current, self._verified(chosen), "rollback")

    def recover(self) -> None:
        """Take back a switch that was killed before it ended."""
        entry = self.ledger.unfinished
        if entry:
            self.tell({"event": "recovering", "release": entry["release"]})
            self._back(entry["release"], entry["former"], "What switched to it was killed before it was confirmed.")

    def _verified(self, name: str) -> VerifiedRelease:
        try:
            return verify_release(self.root.release(name), self.root.trust)
        except Failure as error:
            self.ledger.append(REFUSED, release=name, why=error.event["message"])
            raise

    def _refuse(self, name: str, why: str, next_step: str) -> None:
        self.ledger.append(REFUSED, release=name, why=why)
        raise Failure("refused", why, next_step)

    def _smoke(self, name: str, release: VerifiedRelease) -> None:
        """Ask the release on another port, while the present one still serves."""
        port = self.order["smoke_port"]
        if not port:
            return
        self.tell({"event": "smoke", "port": port})
        with running_server(self.order["serve"], self.root.release(name), port) as alive:
            wrong = self._answers(Endpoint("127.0.0.1", port, None), release, alive)
        if wrong:
            self._refuse(name, f"On port {port}: {wrong}", "The former release still serves. Build and sign another.")

    def _change(self, name: str, former: str | None, release: VerifiedRelease, reason: str) -> None:
        # On the disk before the link changes: whatever happens then, the next one knows of it.
        self.ledger.append(SWITCHING, release=name, former=former, counter=release.counter, reason=reason)
        self.root.switch(name)
        self.tell({"event": "switched", "release": name, "former": former})
        wrong = self._restarted() or self._wrong(release)
        if wrong:
            answers = self._back(name, former, wrong)
            raise Failure(
                "rolled back",
                f"{wrong} {_state(former, answers)}",
                "Look into the release; what served before is served again." if not answers else "Look at the server.",
            )
        entry = self.ledger.append(CONFIRMED, release=name, counter=release.counter, digest=release.digest)
        self.tell({"event": "confirmed", "release": name, "time": entry["time"], "head": self.ledger.head})

    def _back(self, name: str, former: str | None, why: str) -> str | None:
        """Serve what was served before; None, or why that does not answer either."""
        self.root.switch(former if former in self.root.names() else None)
        wrong = self._restarted()
        if former and not wrong:
            wrong = wait_until_ready(self.endpoint, former, self.order["ready_s"], _nothing)
        self.ledger.append(BACK, release=name, former=former, why=why, answers=wrong)
        self.tell({"event": "rolled back", "release": name, "former": former, "why": why})
        return wrong

    def _wrong(self, release: VerifiedRelease) -> str | None:
        return self._answers(self.endpoint, release, _nothing)

    def _answers(self, endpoint: Endpoint, release: VerifiedRelease, alive: Callable[[], str | None]) -> str | None:
        def tell(index: int, of: int) -> None:
            self.tell({"event": "golden", "index": index, "of": of})

        return wait_until_ready(endpoint, release.directory.name, self.order["ready_s"], alive) or check_golden(
            endpoint, release.directory, self.order["tolerance_nats"], tell
        )

    def _restarted(self) -> str | None:
        """Have the server begin with what ``current`` is now; None, or why it did not."""
        command = self.order["restart"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_RESTART_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"The server was not restarted: {error}."
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
            return f"The server was not restarted: {' '.join(command)} ended with {done.returncode}: {''.join(said)}."
        return None


def _state(former: str | None, answers: str | None) -> str:
    if former is None:
        return "Nothing was served before, and nothing is now."
    if answers:
        return f"The former release {former} is current again, and does not answer either: {answers}"
    return f"The former release {former} serves again."


def _nothing() -> None:
    return None


@contextlib.contextmanager
def running_server(command: list[str], release: Path, port: int) -> Iterator[Callable[[], str | None]]:
    """Run a server of ``release`` on ``port`` of the loopback; yields a function that says why it is gone."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LISTEN_", "NOTIFY_"))}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*command, str(release), "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  There is one thread.
        )

        def alive() -> str | None:
            if process.poll() is None:
                return None
            output.seek(max(0, output.seek(0, os.SEEK_END) - 2000))
            said = output.read().decode("utf-8", "replace").strip().splitlines()
            return f"The server ended with {process.returncode}: {' '.join(said[-3:])}"

        try:
            yield alive
        finally:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _die_with_parent() -> None:
    # So that nothing is left running where this is killed.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
