"""Signs of life of ranks: who is noticed as gone, and who is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as distributed

from glmexport.foundation.errors import EXIT_MACHINE
from glmexport.quantization.ranks import RankLost
from glmexport.workflows import heartbeats
from glmexport.workflows.heartbeats import heard_of

SCRIPT = Path(__file__).with_name("silent_rank.py")
PATIENCE = 120


@pytest.fixture
def store() -> Any:
    stores: Any = distributed
    return stores.TCPStore("localhost", 0, 1, True, timedelta(seconds=20), wait_for_workers=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "_BEAT_S", 0.02)
    monkeypatch.setattr(heartbeats, "_SILENT_BEATS", 40)


def test_ranks_that_beat_are_never_lost(store: Any) -> None:
    lost: list[RankLost] = []
    with heard_of(store.clone(), 0, 2, lost.append), heard_of(store.clone(), 1, 2, lost.append):
        time.sleep(2.0)
    assert lost == [] and int(store.add("beats of rank 1", 0)) > 40


def test_a_rank_that_falls_silent_is_named(store: Any) -> None:
    lost: list[RankLost] = []
    noticed = threading.Event()

    def notice(error: RankLost) -> None:
        lost.append(error)
        noticed.set()

    with heard_of(store.clone(), 0, 3, notice), heard_of(store.clone(), 1, 3, lambda _: None):
        assert noticed.wait(PATIENCE)
    (error,) = lost
    assert "Rank 0 of 3 has not heard of rank 2" in error.message and "same command again" in error.next_step


def test_a_rank_that_has_done_its_part_is_not_waited_for(store: Any) -> None:
    lost: list[RankLost] = []
    with heard_of(store.clone(), 0, 2, lost.append):
        with heard_of(store.clone(), 1, 2, lost.append):
            pass
        time.sleep(2.0)
    assert lost == []


def test_own_beats_are_what_silence_is_measured_in(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had slept: hours go by, and no beat."""
    heart = heartbeats._Heart(store, 0, 2)
    store.add("beats of rank 1", 1)
    assert heart.beat() is None
    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    assert all(heart.beat() is None for _ in range(39))
    assert heart.beat() is not None


def test_a_store_that_is_gone_is_a_host_that_is_gone() -> None:
    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("Connection reset by peer")

    error = heartbeats._Heart(Gone(), 1, 2).beat()
    assert error is not None and "does not reach the store" in error.message


@pytest.mark.slow
def test_ranks_that_wait_for_one_that_hangs_end_with_a_message() -> None:
    """It is stopped while the other waits for it in gloo, which no exception wakes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    process = subprocess.Popen(
        launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    stopped = int(process.stdout.readline())
    os.kill(stopped, signal.SIGSTOP)
    try:
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        # torchrun kills it as soon as the other has ended.
        with suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    assert "Rank 0 of 2 has not heard of rank 1" in errors
    assert f"exitcode  : {EXIT_MACHINE} " in errors
