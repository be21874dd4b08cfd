"""The ranks that torchrun has started: how they find one another, agree on the job, and end.

torchrun tells each process its number and where they meet in the environment. Whoever starts torchrun on every host,
such as SLURM or Kubernetes, is no business of ours.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from glmexport.bundle.bundle import Bundle
from glmexport.foundation.errors import EXIT_BUG, BundleError, GlmexportError, InputError, MachineError
from glmexport.foundation.files import write_atomically
from glmexport.quantization.ranks import ALONE, RankLost, Ranks
from glmexport.results.arithmetic import OriginalArithmetic
from glmexport.workflows.heartbeats import heard_of

#: Variables that torchrun sets: the number of this process, how many there are, and the address at which they meet.
_SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: The time in which all have to arrive, and the longest that they then wait for one another: while one decides on
#: formats for all, the others wait for hours. A rank that ends is noticed at once, as its connections end with it, and
#: a host that is gone by its missing signs of life.
_ARRIVAL, _PATIENCE = timedelta(minutes=10), timedelta(days=14)
#: The longest that a file of another host may take to be seen, seconds.
_VISIBLE_S = 90.0


class ToldElsewhere(Exception):
    """This rank ends because of an error that another rank has told people of."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def started_by_torchrun() -> bool:
    """Return whether this process is one of several that torchrun has started."""
    return all(name in os.environ for name in _SET) and int(os.environ["WORLD_SIZE"]) > 1


def ranks_here() -> int:
    """Return the number of ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if started_by_torchrun() else 1


def of_this_rank(device: str, threads: int) -> tuple[str, int]:
    """Return the share of a rank in what its host has: the name of its device, and how many of ``threads`` it gets.

    Raises:
        InputError: ``device`` is one of several, and ranks cannot share it.
    """
    if not started_by_torchrun():
        return device, threads
    if device.startswith("cuda:"):
        raise InputError(
            f"All ranks would quantize on {device}.", next_step="Give --device cuda, of which each takes its own."
        )
    number = os.environ.get("LOCAL_RANK", "0")
    share = max(1, threads // ranks_here())
    return (f"cuda:{number}" if device == "cuda" else device), share


def arithmetic_of_all(ranks: Ranks, choose: Callable[[], OriginalArithmetic]) -> OriginalArithmetic:
    """Return the arithmetic that ``choose`` gives on rank 0, by which all of them compute."""
    return OriginalArithmetic.model_validate(ranks.decide(lambda: choose().model_dump(mode="json")))


@contextmanager
def joined_ranks(device: torch.device, tell: Callable[[RankLost], object]) -> Iterator[Ranks]:
    """Meet the other ranks, and part from them at the end; one process alone meets nobody.

    Tensors on ``device`` are sent by nccl if it is a CUDA device, and by gloo otherwise. Where a rank gives no sign of
    life any more, one of the others does ``tell`` people, from another thread, and all of them end at once.

    Raises:
        RankLost: they did not all arrive, or one of them ended early, and this rank is the one to say so.
        ToldElsewhere: the same, or an error of this rank, and another rank has said so.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ranks = Ranks(rank, size, device)
    store = _meet(rank, size)

    def end_all(error: RankLost) -> None:
        if _is_first_to_tell(store.clone()):
            tell(error)
        # Whatever the other threads wait for. The work directory is the only truth.
        os._exit(error.exit_code)

    try:
        with _stopped_plainly(ranks), heard_of(store.clone(), rank, size, end_all):
            backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
            if device.type == "cuda":
                torch.cuda.set_device(device)
            with ranks.others():
                torch.distributed.init_process_group(
                    backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE
                )
            yield ranks
    except BaseException as error:
        if not _is_first_to_tell(store):
            raise ToldElsewhere(getattr(error, "exit_code", EXIT_BUG)) from error
        if isinstance(error, GlmexportError):
            error.message = f"Rank {rank} of {size}: {error.message}"
        raise
    finally:
        # Where a rank is gone, there is nothing to part from.
        with suppress(RuntimeError, ValueError, AssertionError):
            torch.distributed.destroy_process_group()


def _meet(rank: int, size: int) -> Any:
    """Return the store of names that all ranks share, once all of them have come to it.

    Raises:
        RankLost: some of them did not come.
    """
    # Both names are documented, and not among those that it exports to a type checker.
    distributed: Any = torch.distributed
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        found = distributed.TCPStore(address, port, size, serves, _ARRIVAL, wait_for_workers=False)
        # torchrun may start all ranks again; names of the attempt before are not theirs.
        store = distributed.PrefixStore(f"glmexport/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", found)
        store.set(f"rank {rank}", "here")
        store.wait([f"rank {other}" for other in range(size)], _ARRIVAL)
    except RuntimeError as error:
        raise RankLost(
            f"Rank {rank} of {size} did not meet all others at {address}:{port} within "
            f"{_ARRIVAL.seconds // 60} minutes.",
            next_step="Check that as many were started as torchrun was told, and that they reach that address.",
        ) from error
    return store


def _is_first_to_tell(store: Any) -> bool:
    """Return whether no rank has told people of an error yet; where nobody knows any more, this one had better."""
    try:
        store.set_timeout(timedelta(seconds=10))
        return bool(store.add("told", 1) == 1)
    except RuntimeError:
        return True


@contextmanager
def _stopped_plainly(ranks: Ranks) -> Iterator[None]:
    """Turn the signal that torchrun sends when another rank has ended into an error that says so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise RankLost(
            f"Rank {ranks.rank} of {ranks.size} was told to stop, as torchrun does when another rank has ended.",
            next_step="See what the other said; then run the same command again. It goes on after the last finished "
            "piece.",
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse_differences(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Check that all ranks work on the same: that their ``facts``, by name, are those of rank 0.

    Raises:
        InputError: one of them does not, on every rank alike.
    """
    expected, *others = ranks.gather(dict(facts))
    for rank, found in enumerate(others, 1):
        for name in sorted({*expected, *found}):
            if found.get(name) != expected.get(name):
                raise InputError(
                    f"The {name} of rank {rank} is {found.get(name)}, and that of rank 0 is {expected.get(name)}.",
                    next_step="Give all ranks the same command, checkpoint and versions; then run it again.",
                )


def require_shared(ranks: Ranks, directory: Path) -> None:
    """Check that every rank sees the files that rank 0 writes into ``directory``.

    Raises:
        MachineError: one of them does not, on every rank alike.
    """
    if ranks.alone:
        return
    path = directory / "ranks"
    token = ranks.decide(lambda: secrets.token_hex(16))
    if ranks.first:
        write_atomically(path, token.encode())
    ranks.barrier()
    deadline = time.monotonic() + _VISIBLE_S
    while not (seen := _content(path) == token) and time.monotonic() < deadline:
        time.sleep(1.0)
    _refuse_blind(ranks, seen, directory)


def opened_by_all(ranks: Ranks, directory: Path) -> Bundle:
    """Return the bundle that rank 0 has written into ``directory``, once this rank sees it.

    Raises:
        MachineError: one of them does not see it, on every rank alike.
    """
    digest = ranks.decide(lambda: Bundle.open(directory).digest)
    deadline = time.monotonic() + _VISIBLE_S
    while (bundle := _bundle(directory, digest)) is None and time.monotonic() < deadline:
        time.sleep(1.0)
    _refuse_blind(ranks, bundle is not None, directory)
    assert bundle is not None
    return bundle


def _bundle(directory: Path, digest: str) -> Bundle | None:
    try:
        bundle = Bundle.open(directory)
    except BundleError:
        return None
    return bundle if bundle.digest == digest else None


def _refuse_blind(ranks: Ranks, sees: bool, directory: Path) -> None:
    blind = [rank for rank, each in enumerate(ranks.gather(sees)) if not each]
    if blind:
        raise MachineError(
            f"Rank {blind[0]} does not see the files that rank 0 writes into {directory}.",
            next_step="Give -o a place in a folder that all hosts share.",
        )


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
