"""Several ranks on this machine, started by one command: what torchrun does, for people who need not know it."""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from glmexport.foundation.errors import EXIT_PASS, MachineError


def run_workers(count: int, arguments: Sequence[str]) -> int:
    """Run Python with ``arguments`` as so many ranks, and return the exit code of the one that failed first, or of all.

    Raises:
        MachineError: a signal ended one of them.
        KeyboardInterrupt: a signal was sent to this process.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        # A free port of this machine's own address.
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    # A rank that fails has said why.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException as error:
        raise KeyboardInterrupt from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise MachineError(
                f"Rank {rank} of {count} was ended by signal {-failure.exitcode}; without memory, the system sends 9.",
                next_step="Run the same command again, perhaps with fewer --workers; it goes on after the last "
                "finished piece.",
            ) from error
        return int(failure.exitcode)
    return EXIT_PASS
