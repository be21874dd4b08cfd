"""One rank of a walk through a tiny model, as torchrun starts it: ``ranked_walk.py KIND SCRATCH WORK [RANK STEP]``.

Every rank makes a copy of the checkpoint of its own below SCRATCH. With RANK and STEP that rank dies by SIGKILL when
it has computed so many items of work.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import torch  # noqa: E402
from models import LATENT, MIXTURE  # noqa: E402
from tiny import NEAREST, RECIPE, Model  # noqa: E402

from glmexport.foundation.recipe import Budget, Recipe  # noqa: E402
from glmexport.quantization.ranks import Parcel, Ranks  # noqa: E402
from glmexport.quantization.walk import Walk  # noqa: E402
from glmexport.reference.reference import CPU  # noqa: E402
from glmexport.workflows.ranks import joined_ranks  # noqa: E402

KINDS: dict[str, tuple[dict[str, Any], Recipe]] = {
    "dense": ({}, RECIPE),
    "nearest": ({}, NEAREST),
    "budget": ({}, RECIPE.model_copy(update={"budget": Budget(bits_per_weight=5.0, probe_tokens=256)})),
    "mixture": ({"model_type": "glm4_moe", **MIXTURE}, RECIPE),
    "latent": ({"model_type": "glm4_moe_lite", **LATENT, **MIXTURE, "num_attention_heads": 4}, RECIPE),
}


def dying(ranks: Ranks, items: int) -> None:
    """Kill this process once it has computed so many items of work."""
    each, left = Ranks.each, [items]

    def counted(compute: Callable[[Any], Parcel]) -> Callable[[Any], Parcel]:
        def computed(item: Any) -> Parcel:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return compute(item)

        return computed

    def killed(self: Ranks, items: Any, compute: Callable[[Any], Parcel]) -> Any:
        return each(self, items, counted(compute))

    Ranks.each = killed  # type: ignore[method-assign]


def main(kind: str, scratch: str, work: str, rank: str = "-1", step: str = "0") -> None:
    torch.set_num_threads(1)
    changes, recipe = KINDS[kind]
    # transformers saves on rank 0 alone once there is a group.
    model = Model(Path(scratch) / f"rank_{os.environ['RANK']}", **changes)
    with joined_ranks(CPU, print) as ranks:
        job = model.job(Path(work), recipe, ranks=ranks)
        if ranks.rank == int(rank):
            dying(ranks, int(step))
        Walk.prepare(job).take_steps()


if __name__ == "__main__":
    main(*sys.argv[1:])
