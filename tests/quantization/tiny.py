"""A tiny model with random weights, and walks through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import write_checkpoint

from glmexport.architecture.description import Architecture
from glmexport.calibration.corpus import shipped_documents
from glmexport.calibration.sequences import CalibrationSet, pack
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.files import sha256
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import CalibrationPlan, Format, Recipe, Solver
from glmexport.quantization.job import QuantizationJob
from glmexport.quantization.memory import MemoryPlan
from glmexport.quantization.quantized_model import QuantizedModel
from glmexport.quantization.ranks import ALONE, Ranks
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.walk import Walk
from glmexport.reference.describe import describe
from glmexport.reference.reference import CPU
from glmexport.tokenizer.tokenizer import Tokenizer

W4G32, W8G32 = Format(bits=4, group_size=32), Format(bits=8, group_size=32)
RECIPE = Recipe(
    name="tiny",
    summary="",
    linears=W4G32,
    lm_head=W8G32,
    embedding=W8G32,
    solver=Solver(polish_rounds=1),
    calibration=CalibrationPlan(tokens=2048, sequence_length=64, quota={"zh": 1, "en": 1}),
)
NEAREST = Recipe(
    name="nearest",
    summary="",
    linears=W4G32,
    lm_head=W8G32,
    embedding=W8G32,
    solver=Solver(method="round-to-nearest", scale_search=False),
)
#: Small batches, so that every matrix and every stream is cut into several.
MEMORY = MemoryPlan(batch_tokens=7 * 64, chunk_weights=160 * 64, peak_bytes=0)
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class Model:
    """A checkpoint, what it describes, and calibration sequences for it."""

    def __init__(self, path: Path, **changes: Any) -> None:
        write_checkpoint(path, **(TINY | changes))
        checkpoint = Checkpoint.open(path)
        self.architecture: Architecture = describe(checkpoint)
        self.checkpoint = self.architecture.presented(checkpoint)
        documents = shipped_documents("calibration", ["zh", "en"])
        assert RECIPE.calibration is not None
        self.calibration = pack(documents, Tokenizer.open(path), RECIPE.calibration, self.architecture.context_length)

    def job(
        self,
        directory: Path,
        recipe: Recipe = RECIPE,
        progress: Silent | None = None,
        device: torch.device = CPU,
        ranks: Ranks = ALONE,
    ) -> QuantizationJob:
        calibration: CalibrationSet | None = self.calibration if recipe.needs_calibration else None
        work = WorkDirectory(directory, {"recipe": recipe.digest()}, makes=ranks.first)
        progress = progress or Silent()
        return QuantizationJob(
            self.checkpoint, self.architecture, recipe, calibration, work, MEMORY, progress, device, ranks
        )

    def walk(self, *arguments: Any, **named: Any) -> Walk:
        """A walk of which no step is taken yet; arguments as for ``job``."""
        return Walk.prepare(self.job(*arguments, **named))

    def walked(self, *arguments: Any, **named: Any) -> QuantizedModel:
        return self.walk(*arguments, **named).run()

    def matrices(self) -> set[str]:
        return {self.architecture.embedding} | {linear.weight for _, linear in self.architecture.linears}


def digests(walk: Walk | QuantizedModel) -> dict[str, str]:
    """Of every file that is not a note of how long it took."""
    return {path.name: sha256(path) for path in walk.job.work.path.iterdir() if path.suffix != ".json"}
