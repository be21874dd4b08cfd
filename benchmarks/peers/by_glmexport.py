"""glmexport's own solver, on the same contract as the peers, with each part of it that can be left out.

The calibration file also says which sequences are held out and of which language each is; the peers read the same
sequences, all of them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import request
from safetensors import safe_open
from safetensors.torch import load_file

from glmexport.calibration.sequences import CalibrationSet
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.checkpoint.fold import Fold
from glmexport.formats.codecs import stored_bits
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Budget, CalibrationPlan, Format, Recipe
from glmexport.quantization.job import QuantizationJob
from glmexport.quantization.memory import plan_memory
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.walk import walk
from glmexport.reference.arithmetic import computing
from glmexport.reference.arithmetic_choice import choose_arithmetic
from glmexport.reference.describe import describe
from glmexport.results.arithmetic import UNCHECKED

NEAREST: dict[str, Any] = {"method": "round-to-nearest"}
ALONE: dict[str, Any] = {
    "fold_scales": False,
    "asymmetric": False,
    "polish_rounds": 0,
    "scale_search": False,
    "order": "stored",
}
#: Settings of the solver; all but the first change something.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "without asymmetric target": {"asymmetric": False},
    "without folds": {"fold_scales": False},
    "without polish": {"polish_rounds": 0},
    "4 rounds of polish": {"polish_rounds": 4},
    "without scale search": {"scale_search": False},
    "in stored order": {"order": "stored"},
    "GPTQ alone": ALONE,
    "GPTQ, scale search": {**ALONE, "scale_search": True},
    "GPTQ, scale search, group order": {**ALONE, "scale_search": True, "order": "group"},
    # By the arithmetic that a build chooses here; all others by torch's default, on any machine.
    "as built": {},
    "nearest, searched": NEAREST,
    "nearest": {**NEAREST, "scale_search": False},
}


def calibration_set(path: Path) -> CalibrationSet:
    """What ``benchmarks.quality`` wrote."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    return CalibrationSet(tensors["ids"], tuple(facts["languages"]), facts["prefix"], tensors["selection"])


def recipe(form: Format, solver: dict[str, Any], bundle_bytes: int | None) -> Recipe:
    """The linears of the blocks alone, as for every peer."""
    calibrated = solver.get("method") != "round-to-nearest"
    # The text is given, not planned.
    plan = CalibrationPlan(tokens=1024, sequence_length=64, quota={"en": 1}) if calibrated else None
    budget = Budget(bundle_bytes=bundle_bytes) if bundle_bytes else None
    return Recipe.model_validate(
        {"name": "quality", "summary": "", "linears": form, "solver": solver, "calibration": plan, "budget": budget}
    )


def main() -> None:
    asked = request(list(SETTINGS))
    mixed = asked.bits_per_weight
    with asked.clock("loading"):
        checkpoint = Checkpoint.open(asked.checkpoint)
        architecture = describe(checkpoint)
        calibration = calibration_set(asked.calibration)
    shapes = architecture.shapes()
    linears = {linear.weight: shapes[linear.weight] for layer, linear in architecture.linears if layer is not None}
    limit = None
    if mixed:
        others = sum(stored_bits(shape, None) for key, shape in shapes.items() if key not in linears)
        bits = others + mixed * sum(rows * columns for rows, columns in linears.values())
        limit = int(bits / 8) + architecture.rotary_bytes
    form = Format.model_validate({"bits": asked.bits, "group_size": asked.group_size, "symmetric": asked.symmetric})
    chosen = recipe(form, SETTINGS[asked.setting], limit)
    arithmetic = UNCHECKED
    if asked.setting == "as built":
        arithmetic = choose_arithmetic("auto", torch.get_num_threads(), Silent())
    with tempfile.TemporaryDirectory() as folder, asked.clock("quantizing"), computing(arithmetic):
        text = calibration if chosen.needs_calibration else None
        memory = plan_memory(architecture, chosen)
        work = WorkDirectory(Path(folder), {})
        job = QuantizationJob(checkpoint, architecture, chosen, text, work, memory, Silent(), arithmetic=arithmetic)
        model = walk(job)
        folds = model.job.checkpoint.folds
        stored = model.weights()
        quantized = {record.key: stored.quantized(record.key) for record in model.records}
    asked.write(
        # In the original's place, next to norms that nothing was folded into.
        {key: folds.get(key, Fold()).undo(linear.dequantize()) for key, linear in quantized.items()},
        sum(linear.stored_bits for linear in quantized.values()),
        chosen.solver.model_dump(),
        [],
        arithmetic=arithmetic.label,
        fallbacks=[f"{record.key}: {record.fallback}" for record in model.records if record.fallback],
        formats={record.key: f"w{record.bits}g{record.group_size}" for record in model.records} if mixed else {},
        shrinkage=[record.shrinkage for record in model.records],
        effective_tokens_per_column=min((r.effective_tokens_per_column or 0 for r in model.records), default=0),
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
