"""The ledger of what was done on a server: a JSON document a line, each with the SHA-256 of the line before it.

A line that is changed, removed or put in between breaks the chain. Lines removed from the end do not: whoever wants to
notice that keeps the last hash, which every deployment prints, elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from glmexport.foundation.untrusted import SMALL, parse
from glmexport.wire.server.layout import synchronize
from glmexport.wire.standalone import Failure

#: The hash that the first line has for the line before it.
BEGINNING = "0" * 64
CONFIRMED, SWITCHING, BACK, REFUSED = "confirmed", "switching", "rolled back", "refused"


class Ledger:
    """The ledger in the file ``path``, which need not be there yet.

    Raises:
        Failure: its chain is broken.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: list[dict[str, Any]] = []
        self.head = BEGINNING
        content = path.read_bytes() if path.is_file() else b""
        whole, _, self._torn = content.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
            self._read(number, line)

    def _read(self, number: int, line: bytes) -> None:
        try:
            entry = parse(line, SMALL)
            legal = entry["number"] == number and entry["previous"] == self.head
        except (ValueError, KeyError, TypeError):
            legal = False
        if not legal:
            raise Failure(
                "ledger",
                f"Line {number} of {self._path} does not follow from the one before: somebody changed the ledger.",
                "Find out who and why. To begin another ledger, move this one away.",
            )
        self.entries.append(entry)
        self.head = hashlib.sha256(line).hexdigest()

    def append(self, event: str, **facts: object) -> dict[str, Any]:
        """Write one more line, which is on the disk when this returns."""
        if self._torn:
            # A crash left it half written, so nothing was done yet that it tells of.
            kept = self._path.stat().st_size - len(self._torn)
            torn, self._torn = len(self._torn), b""
            os.truncate(self._path, kept)
            self.append("torn", bytes=torn)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry = {"number": len(self.entries) + 1, "time": now, "event": event, **facts, "previous": self.head}
        line = json.dumps(entry, sort_keys=True).encode()
        with self._path.open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        synchronize(self._path.parent)
        self.entries.append(entry)
        self.head = hashlib.sha256(line).hexdigest()
        return entry

    @property
    def counter(self) -> int:
        """The highest release counter that was ever confirmed; 0: none."""
        return max((entry["counter"] for entry in self.entries if entry["event"] == CONFIRMED), default=0)

    @property
    def unfinished(self) -> dict[str, Any] | None:
        """A switch with an unknown end: what did it was killed."""
        ends = [entry for entry in self.entries if entry["event"] in (SWITCHING, CONFIRMED, BACK)]
        return ends[-1] if ends and ends[-1]["event"] == SWITCHING else None

    def confirmed(self) -> list[str]:
        """Return the releases in the order in which they were last confirmed."""
        names = [entry["release"] for entry in self.entries if entry["event"] == CONFIRMED]
        return sorted(set(names), key=lambda name: len(names) - 1 - names[::-1].index(name))
