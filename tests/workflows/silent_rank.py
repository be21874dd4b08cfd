"""One rank of two as torchrun starts them: the first waits for the second, which says its number and does nothing."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from glmexport.quantization.ranks import RankLost
from glmexport.reference.reference import CPU
from glmexport.workflows import heartbeats
from glmexport.workflows.ranks import joined_ranks


def tell(error: RankLost) -> None:
    print(error.message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    heartbeats._BEAT_S, heartbeats._SILENT_BEATS = 0.1, 30
    with joined_ranks(CPU, tell) as ranks:
        ranks.barrier()
        if not ranks.first:
            print(os.getpid(), flush=True)
            time.sleep(600)
        ranks.barrier()
