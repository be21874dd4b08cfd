"""Programs that torchrun starts with several ranks, as people do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: Seconds after which ranks that have not ended wait for one another.
PATIENCE = 300


def launch(script: Path, count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``script`` with ``count`` ranks of one thread each."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*torchrun, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=PATIENCE,
        check=False,
    )
