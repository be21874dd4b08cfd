"""Processor seconds of a build and its validation by stage, beside the account that ``glmexport inspect`` rests on.

    python -m benchmarks.cost [--shape 9b] [--layers 1] [--vocabulary 8192] [--threads N] [--target host]
                              [--recipe NAME] [--tokens N] [--positions N] [--work DIR] [--output FILE]

A checkpoint of one decoder block of that shape, filled with noise, goes through the real build. Its stages are timed by
wrapping the functions that they consist of (``benchmarks.stages``): seconds of all threads of this process, and of wall
time. Beside them is what the account says of this very block; and of the whole model what the account says, times
what the block took over what was said of it. ``--shape small`` is for trying the program.

Everything runs in one process but the measurement of speed. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.stages import OTHER, QUANTIZATION, VALIDATION, Stages
from benchmarks.synthetic import write_synthetic
from glmexport.cli.console import Terminal
from glmexport.foundation import machine
from glmexport.foundation.target import open_target
from glmexport.foundation.work import Account, Work
from glmexport.quantization.account import TextSize
from glmexport.quantization.memory import plan_memory
from glmexport.reference.arithmetic_choice import choose_arithmetic
from glmexport.validation.conditions import BehaviourPlan, ValidationPlan
from glmexport.workflows.build import build
from glmexport.workflows.calibration_text import read_calibration_text
from glmexport.workflows.cost import build_accounts, stage_seconds
from glmexport.workflows.estimate import Planned, estimate
from glmexport.workflows.job import jobs_of
from glmexport.workflows.original import Original
from glmexport.workflows.unit_costs import unit_costs
from glmexport.workflows.validate import BuildOptions

#: Shapes of one block, and of the whole model: layers and vocabulary.
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "9b": (
        {
            "hidden_size": 4096, "intermediate_size": 13696, "num_attention_heads": 32, "num_key_value_heads": 2,
            "head_dim": 128,
        },
        40,
        151_552,
    ),
    "32b": (
        {
            "hidden_size": 6144, "intermediate_size": 23040, "num_attention_heads": 48, "num_key_value_heads": 8,
            "head_dim": 128,
        },
        61,
        151_552,
    ),
    "small": (
        {
            "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 64,
        },
        4,
        16_384,
    ),
}  # fmt: skip
#: The longest text that the block's checkpoint allows.
_CONTEXT = 8192


def repeated(planned: Planned, layers: int, vocabulary: int) -> Planned:
    """What is planned, with so many layers like the first one, and another vocabulary."""
    architecture = planned.architecture
    head = replace(architecture.lm_head, out_features=vocabulary)
    # The same weights again: the account asks for shapes and formats.
    whole = replace(architecture, layers=architecture.layers[:1] * layers, lm_head=head, vocabulary_size=vocabulary)
    return replace(planned, architecture=whole)


def account_of(
    planned: Planned, text: TextSize | None, plan: ValidationPlan, stored: int, prefix: int
) -> tuple[Account, Account]:
    size = estimate(planned, None).bundle_bytes
    memory = plan_memory(planned.architecture, planned.recipe)
    return build_accounts(planned, text, memory, plan, checkpoint_bytes=stored, bundle_bytes=size, prefix=prefix)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="9b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--arithmetic", choices=("auto", "fp32"), default="auto")
    parser.add_argument("--target", default="host")
    parser.add_argument("--recipe")
    parser.add_argument("--tokens", type=int, help="calibrate on fewer tokens than the recipe says")
    parser.add_argument("--positions", type=int, default=512, help="tokens to judge on in each language")
    parser.add_argument("--questions", type=int, default=1, help="texts a language to go on with")
    parser.add_argument("--answer-tokens", type=int, default=16, help="the length of answers")
    parser.add_argument("--work", type=Path, help="where to keep the checkpoint and the bundle")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        result = measured(arguments, Path(folder))
    text = json.dumps(result, indent=2)
    print(table(result))
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build a block, and return what it took, and what the account says of it and of the whole model."""
    shape, layers, vocabulary = SHAPES[arguments.shape]
    small = {"num_hidden_layers": arguments.layers, "vocab_size": arguments.vocabulary}
    write_synthetic(folder / "checkpoint", {**shape, **small, "max_position_embeddings": _CONTEXT})
    terminal = Terminal()
    arithmetic = choose_arithmetic(arguments.arithmetic, arguments.threads, terminal)
    costs = unit_costs(arithmetic, anew=True)
    original = Original.open(str(folder / "checkpoint"), terminal)
    (job,) = jobs_of(original, [open_target(arguments.target)], arguments.recipe, folder / "bundle")
    if arguments.tokens and job.recipe.calibration:
        calibration = job.recipe.calibration.model_copy(update={"tokens": arguments.tokens})
        job = replace(job, recipe=job.recipe.model_copy(update={"calibration": calibration}))
    # Models of noise agree on no token, so that checking a draft takes a pass a token.
    asked = BehaviourPlan(each=arguments.questions, translations=0, max_tokens=arguments.answer_tokens)
    plan = ValidationPlan(positions_per_language=arguments.positions, behaviour=asked)
    options = BuildOptions(arguments.threads, validation=plan, arithmetic=arithmetic)
    found = Stages()
    started = time.monotonic()
    with found.watching(QUANTIZATION | VALIDATION):
        (built,) = build(original, [job], options, terminal)
    wall = time.monotonic() - started
    sequences = read_calibration_text(original, job.recipe, ()).sequences
    text, prefix = TextSize.of_text(sequences) if sequences else None, len(original.tokenizer.prefix)
    planned = original.planned(job.recipe, job.target)
    block = account_of(planned, text, plan, original.checkpoint.bytes, prefix)
    full = repeated(planned, layers, vocabulary)
    # bf16; the walk of the model and its default validation.
    stored = 2 * sum(each.in_features * each.out_features for _, each in full.architecture.linears)
    model = account_of(full, text, ValidationPlan(), stored, prefix)
    said, whole = (stage_seconds(accounts, costs.seconds, costs.seconds) for accounts in (block, model))
    stages = {}
    for stage in [*said, OTHER]:
        took = found.wall.get(stage, 0.0)
        row: dict[str, Any] = {"processor_seconds": found.processor.get(stage, 0.0), "wall_seconds": took}
        if stage in said:
            row |= {"account_seconds": vars(said[stage]), "model_account_seconds": vars(whole[stage])}
            middle = (said[stage].low + said[stage].high) / 2
            # Of a stage of fixed length, no processor is asked.
            known = middle and took and block[0][stage] != Work(fixed_seconds=block[0][stage].fixed_seconds)
            scale = took / middle if known else 1.0
            row["model_seconds"] = scale * (whole[stage].low + whole[stage].high) / 2
        stages[stage] = row
    return {
        "shape": arguments.shape,
        "layers": arguments.layers,
        "vocabulary": arguments.vocabulary,
        "model": {"layers": layers, "vocabulary": vocabulary},
        "recipe": job.recipe.name,
        "calibration_tokens": text.positions if text else 0,
        "positions_per_language": arguments.positions,
        "questions": [arguments.questions, arguments.answer_tokens],
        "threads": arguments.threads,
        "arithmetic": arithmetic.model_dump(mode="json"),
        "processor": machine.processor_name(),
        "libraries": machine.library_versions(),
        "busy": costs.busy,
        "unit_costs": {kind: vars(cost) for kind, cost in costs.seconds.items()},
        "wall_seconds": wall,
        "processor_seconds": sum(found.processor.values()),
        "peak_bytes": machine.peak_memory(),
        "planned_peak_bytes": estimate(planned, None).peak_memory_bytes,
        "verdict": built.report.verdict if hasattr(built, "report") else None,
        "stages": stages,
        "model_seconds": sum(row.get("model_seconds", 0.0) for row in stages.values()),
    }


def table(result: dict[str, Any]) -> str:
    """The stages as people read them."""
    lines = [f"{'stage':16}{'processor s':>14}{'wall s':>10}{'account, wall s':>22}{'model, wall h':>16}"]
    for stage, row in result["stages"].items():
        account = row.get("account_seconds")
        said = f"{account['low']:.1f} to {account['high']:.1f}" if account else "-"
        hours = f"{row['model_seconds'] / 3600:.2f}" if "model_seconds" in row else "-"
        took = f"{row['processor_seconds']:14.1f}{row['wall_seconds']:10.1f}"
        lines.append(f"{stage:16}{took}{said:>22}{hours:>16}")
    lines.append(
        f"{result['wall_seconds']:.0f} s of wall time, {result['processor_seconds']:.0f} s of {result['threads']} "
        f"threads; peak {result['peak_bytes'] / 2**30:.2f} GiB; the model: {result['model_seconds'] / 3600:.1f} h"
        + ("; the machine was busy" if result["busy"] else "")
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
