"""Deploy to this server, step by step.

    python3 deploy.pyz preflight ROOT ORDER     what the server is
    python3 deploy.pyz hold ROOT                lets nobody else send, until its input ends or falls silent
    python3 deploy.pyz missing ROOT ORDER       names the files that have to be sent
    python3 deploy.pyz assemble ROOT ORDER      makes them a release, verified
    python3 deploy.pyz activate ROOT ORDER      serves it, or what served before
    python3 deploy.pyz rollback ROOT ORDER [NAME]
    python3 deploy.pyz prune ROOT KEEP
    python3 deploy.pyz status ROOT

ORDER is the name of a JSON document in ROOT/orders. What happens is told on the standard output, a JSON document a
line, of which the last is ``done`` or ``error``. ``activate`` and ``rollback`` go on when whoever asked is gone, and
when asked once more for the same order, tell what became of it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from glmexport.wire.server import receiving
from glmexport.wire.server.activation import Activation
from glmexport.wire.server.facts import server_facts
from glmexport.wire.server.layout import PATIENCE_S, Root
from glmexport.wire.server.ledger import Ledger
from glmexport.wire.standalone import Failure, Tell

_NO_SPACE = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
_ORDER = re.compile(r"[0-9a-f]{32}")
#: The argument before a command that goes on by itself.
_DETACHED = "--detached"
#: Names of the commands that go on by themselves.
_LONG = ("activate", "rollback")
#: Seconds without a sign of life after which the sender counts as gone.
_SILENCE_S = 120


def run(command: str, root: Root, arguments: list[str], tell: Tell) -> None:
    """Do one command.

    Raises:
        Failure: what went wrong, to be told.
    """
    if command == "status":
        tell({"event": "status", **status(root)})
    elif command == "hold":
        root.make()
        hold_turn(root, tell)
    elif command == "prune":
        with root.alone():
            prune(root, int(arguments[0]), tell)
    else:
        order = read_order(root, arguments[0])
        root.make()
        keep_trust(root, order)
        if command == "preflight":
            tell({"event": "facts", **preflight(root, order)})
        elif command == "missing":
            receiving.tell_missing(root, order, tell)
        elif command == "assemble":
            with root.alone(PATIENCE_S):
                receiving.assemble(root, order, tell)
        elif command in _LONG:
            with root.alone(PATIENCE_S):
                activation = Activation(root, order, tell)
                if command == "activate":
                    activation.activate()
                else:
                    activation.roll_back(arguments[1] if arguments[1:] else None)
        else:
            raise Failure("usage", f"There is no command {command!r}.", "See the program's first lines.")


def hold_turn(root: Root, tell: Tell) -> None:
    """Hold the turn to send until whoever asked is done, or is gone: then nothing more comes from there."""
    with root.alone(PATIENCE_S, "sending"):
        tell({"event": "held"})
        while select.select([sys.stdin], [], [], _SILENCE_S)[0] and os.read(sys.stdin.fileno(), 1 << 12):
            pass


def read_order(root: Root, name: str) -> dict[str, Any]:
    """Return the order of that name.

    Raises:
        Failure: there is none.
    """
    if not _ORDER.fullmatch(name):
        raise Failure("usage", f"{name!r} is no order.", "Deploy again.")
    order: dict[str, Any] = json.loads((root.orders / f"{name}.json").read_text("utf-8"))
    if (order.get("format"), order.get("version")) != ("glmexport-order", 1):
        raise Failure("usage", f"Order {name} is of another version of glmexport.", "Deploy again.")
    return order


def keep_trust(root: Root, order: dict[str, Any]) -> None:
    """Keep the key that releases are signed with, when the first one comes.

    Raises:
        Failure: this server trusts another.
    """
    known = root.trust.read_text("utf-8") if root.trust.is_file() else None
    if known is None or (known != order["trust"] and order["replace_trust"]):
        with root.alone(PATIENCE_S):
            Ledger(root.ledger).append("trust", key=order["trust"], former=known)
            replace_text(root.trust, order["trust"])
    elif known != order["trust"]:
        raise Failure(
            "trust",
            f"This server trusts another key than the one that is given ({root.trust}).",
            "Give that one, or --replace-key if keys were changed on purpose.",
        )


def replace_text(path: Path, text: str) -> None:
    """Replace a small file, all of it or nothing."""
    from glmexport.wire.standalone import replace

    replace(path, [text.encode()])


def preflight(root: Root, order: dict[str, Any]) -> dict[str, Any]:
    """Return the facts that decide whether a release can come here."""
    ports = [port for port in (order["port"], order["smoke_port"]) if port]
    facts = server_facts(order["serve"], ports)
    ledger = Ledger(root.ledger)
    return {
        **facts,
        **receiving.free_space(root),
        "received_bytes": receiving.received_bytes(root),
        "current": root.current(),
        "counter": ledger.counter,
    }


def status(root: Root) -> dict[str, Any]:
    """Return what is served, what could be, and how it came to that."""
    ledger = Ledger(root.ledger)
    unfinished = ledger.unfinished
    return {
        "current": root.current(),
        "releases": root.names(),
        "confirmed": ledger.confirmed(),
        "unconfirmed": unfinished["release"] if unfinished else None,
        "counter": ledger.counter,
        "head": ledger.head,
        "ledger": ledger.entries[-20:],
    }


def prune(root: Root, keep: int, tell: Tell) -> None:
    """Remove all but the present release, the one before it, and the ``keep`` that served last."""
    ledger = Ledger(root.ledger)
    confirmed, current = ledger.confirmed(), root.current()
    former = [name for name in confirmed if name != current][-1:]
    kept = {current, *former, *confirmed[len(confirmed) - keep :]}
    root.clear()
    root.clear_orders()
    for name in root.names():
        if name not in kept:
            ledger.append("pruned", release=name)
            root.remove(name)
            tell({"event": "pruned", "release": name})


def follow(root: Root, command: str, arguments: list[str], tell: Tell) -> None:
    """Have ``command`` done by a process of its own, and tell what it tells.

    Raises:
        Failure: it ended without an end.
    """
    order = arguments[0]
    read_order(root, order)
    events = root.orders / f"{order}.events"
    if not events.exists():
        with events.open("xb") as output:
            subprocess.Popen(
                [sys.executable, sys.argv[0], _DETACHED, command, str(root.path), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
    with events.open("rb") as told:
        patience, line = 50, b""
        while True:
            line += told.readline()
            if line.endswith(b"\n"):
                event = _event(line)
                line = b""
                if event.get("event") == "done":
                    return
                if event.get("event") == "error":
                    raise Failure(*(str(event[name]) for name in ("kind", "message", "next_step")))
                tell(event)
                continue
            time.sleep(0.1)
            # Between starting and holding the lock nobody holds it.
            patience = 50 if _held(root) else patience - 1
            if not patience:
                raise Failure(
                    "ended", "What switched releases was killed.", "Run the same command again: it is taken back first."
                )


def _event(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict):
            return event
    return {"event": "said", "text": line.decode("utf-8", "replace").rstrip()}


def _held(root: Root) -> bool:
    try:
        with root.alone():
            return False
    except Failure:
        return True


def _failure(error: Exception, root: Root) -> Failure:
    if isinstance(error, Failure):
        return error
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return Failure("disk", f"There is no space left in {root.path}.", "Free space, then run it again; it goes on.")
    if isinstance(error, PermissionError):
        return Failure("permission", f"{error.strerror}: {error.filename}.", "Correct its owner or its mode.")
    first = next(iter(str(error).splitlines()), "")
    return Failure("runtime", f"{type(error).__name__}: {first}", "Run it again; if it stays so, report this line.")


def main(arguments: list[str]) -> int:
    """Do what is asked; return 0, or 1 after an ``error``."""
    detached = arguments[:1] == [_DETACHED]
    command, place, *rest = arguments[detached:]
    root = Root(Path(place).expanduser().absolute())

    def tell(event: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()

    try:
        if command in _LONG and not detached:
            follow(root, command, rest, tell)
        else:
            run(command, root, rest, tell)
    except Exception as error:
        # Whatever it is, whoever asked is told: they see nothing of this server but the events.
        tell(_failure(error, root).event)
        return 1
    tell({"event": "done"})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
