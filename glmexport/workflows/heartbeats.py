"""Signs of life of ranks, as a host that loses its power or its network closes no connection.

Every rank counts up a number of its own in the store that all share, and looks at those of the others. Silence is
measured in a rank's own beats: where a machine sleeps, or all ranks are stopped, none of them counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from glmexport.quantization.ranks import RankLost

#: Seconds between two beats of a rank.
_BEAT_S = 20.0
#: Number of beats without a sign of life after which a rank counts as lost: ten minutes. A rank whose processor is
#: given to others, or whose disk stalls, is not heard of for less.
_SILENT_BEATS = 30
_KEY = "beats of rank {}"
#: A number of beats that no rank lives to give: it has done its part and left.
_LEFT = 1 << 40


@contextmanager
def heard_of(store: Any, rank: int, size: int, on_silence: Callable[[RankLost], object]) -> Iterator[None]:
    """Give signs of life while the body runs, and call ``on_silence`` from another thread if a rank gives none.

    The body may be waiting for that very rank, and cannot be woken. ``store`` is a connection that only this uses.
    """
    over = threading.Event()
    heart = _Heart(store, rank, size)

    def beat() -> None:
        while not over.is_set():
            lost = heart.beat()
            if lost and not over.is_set():
                on_silence(lost)
                return
            over.wait(_BEAT_S)

    thread = threading.Thread(target=beat, name="heartbeats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5.0)
        # If the store is gone, nobody waits for this rank.
        with suppress(RuntimeError):
            heart.leave()


class _Heart:
    """The beats of one rank, and what it has seen of the others'."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._others = [other for other in range(size) if other != rank]
        self._beats = 0
        #: The last number that was seen of each other rank, and the own beat at which it was new.
        self._seen = dict.fromkeys(self._others, (0, 0))

    def beat(self) -> RankLost | None:
        """Give a sign of life, and return an error if another rank has given none for too long."""
        self._beats += 1
        try:
            self._store.add(_KEY.format(self._rank), 1)
            counts = {other: self._store.add(_KEY.format(other), 0) for other in self._others}
        except RuntimeError:
            return self._lost("does not reach the store that all ranks share: its host is gone, or the network to it")
        for other, count in counts.items():
            if count != self._seen[other][0] or count >= _LEFT:
                self._seen[other] = count, self._beats
        silent = [other for other in self._others if self._beats - self._seen[other][1] >= _SILENT_BEATS]
        if silent:
            minutes = round(_SILENT_BEATS * _BEAT_S / 60)
            return self._lost(f"has not heard of rank {silent[0]} for {minutes} minutes")
        return None

    def leave(self) -> None:
        """Tell the others that this rank has done its part."""
        self._store.add(_KEY.format(self._rank), _LEFT)

    def _lost(self, what: str) -> RankLost:
        return RankLost(
            f"Rank {self._rank} of {self._size} {what}.",
            next_step="See whether all hosts are up and reach one another; then run the same command again. It goes on "
            "after the last finished piece.",
        )
