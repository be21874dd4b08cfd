"""One rank of a validation as torchrun starts it: ``ranked_validation.py CHECKPOINT BUNDLE WORK OUT [RANK PIECES]``.

Rank 0 writes its figures into OUT. The rank of that number is killed once it has finished so many pieces.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from builds import QUICK, THREADS, TURNS, no_turns  # noqa: E402

from glmexport.bundle.bundle import Bundle  # noqa: E402
from glmexport.calibration.corpus import evaluation_documents  # noqa: E402
from glmexport.foundation.progress import Progress, Silent  # noqa: E402
from glmexport.quantization.ranks import ALONE, Ranks  # noqa: E402
from glmexport.reference.reference import CPU, Reference  # noqa: E402
from glmexport.validation.behaviour.tasks import Task  # noqa: E402
from glmexport.validation.conditions import BehaviourPlan, Conditions  # noqa: E402
from glmexport.validation.pieces import Pieces  # noqa: E402
from glmexport.validation.run import validate  # noqa: E402
from glmexport.validation.texts import EvaluationSet  # noqa: E402
from glmexport.workflows.original import Original  # noqa: E402
from glmexport.workflows.ranks import joined_ranks  # noqa: E402

PLAN = replace(QUICK, behaviour=BehaviourPlan(each=2, translations=0, max_tokens=5, batch=2))
TASK = Task(id="sum", name="own", prompt="1 + 1 =", metric="choice", choices=(" 2", " 3"), target=0)
#: Several batches of four texts.
BATCH_TOKENS = 120
#: Figures that are measured anew each time, or chosen by what this machine is doing.
TIMED = {"performance"}


@contextmanager
def small_batches() -> Iterator[None]:
    """Cut texts as if they were long."""
    with patch.multiple("glmexport.validation.noise", _BATCH_TOKENS=BATCH_TOKENS, _ROUTED_BATCH_TOKENS=BATCH_TOKENS):
        yield


def figures(checkpoint: Path, bundle: Path, work: Path, ranks: Ranks = ALONE, progress: Progress | None = None) -> Any:
    """Return all figures of a validation that keeps its pieces in ``work``; None on all ranks but the first."""
    original, opened = Original.open(str(checkpoint), Silent()), Bundle.open(bundle)
    reference = Reference(original.checkpoint, original.architecture)
    evaluation = EvaluationSet(evaluation_documents((), original.tokenizer), original.tokenizer, (TASK,))
    conditions = Conditions(PLAN, opened.target.gates, THREADS, THREADS, progress or Silent())
    pieces = Pieces(work / "validation", {"bundle": opened.digest}, ranks)
    with patch(TURNS, no_turns), small_batches():
        found = validate(opened, reference, evaluation, conditions, work, pieces)
    if found is None:
        return None
    return {name: repr(value) for name, value in vars(found).items() if name not in TIMED}


def dying(pieces: int) -> None:
    """Kill this process when it has finished so many pieces."""
    save, left = Pieces.save, [pieces]

    def counted(self: Pieces, *values: Any) -> None:
        save(self, *values)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    Pieces.save = counted  # type: ignore[method-assign]


def main(checkpoint: str, bundle: str, work: str, out: str, rank: str = "-1", pieces: str = "0") -> None:
    with joined_ranks(CPU, print) as ranks:
        if ranks.rank == int(rank):
            dying(int(pieces))
        found = figures(Path(checkpoint), Path(bundle), Path(work), ranks)
    if found is not None:
        Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
