"""The graph of a bundle of ours in one format, its codes drawn at random: time does not depend on what they are.

    python -m benchmarks.runtimes.to_bundle CHECKPOINT OUT FORMAT TARGET

Calibration and GPTQ would take hours and change no time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quality import uniform
from glmexport.architecture.description import Architecture
from glmexport.assembly.external import write_graphs
from glmexport.assembly.genai import loop_config
from glmexport.bundle.names import MODEL
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Format
from glmexport.foundation.target import open_target
from glmexport.graph.build import build_graph
from glmexport.lowering.pipeline import lower
from glmexport.quantization.weights import Weights
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference

#: Of the lm_head and the embedding, as in every recipe.
_EIGHT = Format(bits=8, group_size=32)
#: Of groups of numbers with a standard deviation of 0.02, about.
_STEP = 0.008


class RandomWeights(Weights):
    """Vectors are the checkpoint's."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, form: Format) -> None:
        super().__init__(checkpoint, architecture, None, [])
        self._matrices = form
        self._generator = torch.Generator().manual_seed(0)

    def form(self, key: str) -> Format | None:
        if len(self.shape(key)) < 2:
            return None
        return self._matrices if ".layers." in key else _EIGHT

    def packed(self, keys: list[str], what: str) -> Tensor:
        form = self.form(keys[0])
        assert form is not None
        rows, columns = sum(self.shape(key)[0] for key in keys), self.shape(keys[0])[1]
        groups = -(-columns // form.group_size)
        if what == "scales":
            return torch.full((rows, groups), _STEP / 2 ** (form.bits - 4), dtype=torch.float16)
        wide = {"codes": (groups, form.group_size * form.bits // 8), "zero_points": (-(-groups * form.bits // 8),)}
        if what == "zero_points":
            middle = sum(2 ** (form.bits - 1) << shift for shift in range(0, 8, form.bits))
            return torch.full((rows, *wide[what]), middle, dtype=torch.uint8)
        return torch.randint(0, 256, (rows, *wide[what]), dtype=torch.uint8, generator=self._generator)


def main() -> None:
    path, out, form, named = sys.argv[1:]
    checkpoint = Checkpoint.open(Path(path))
    architecture = describe(checkpoint)
    checkpoint = architecture.presented(checkpoint)
    target = open_target(named)
    tables = Reference(checkpoint, architecture).rotary_tables(architecture.context_length)
    graph = build_graph(architecture, target.graph, every_position=False)
    Path(out).mkdir()
    weights = RandomWeights(checkpoint, architecture, uniform(form))
    write_graphs({MODEL: lower(graph, target, weights, tables)}, Path(out), Silent())
    name, config = loop_config(architecture, target)
    (Path(out) / name).write_text(json.dumps(config, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
