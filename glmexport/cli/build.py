"""``glmexport build``: a checkpoint becomes a validated bundle for each target."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmexport.cli.console import Terminal, emit, say
from glmexport.cli.options import (
    adapter_option,
    arithmetic_option,
    budget_options,
    bundle_threads,
    checkpoint_argument,
    crowded,
    device_option,
    evaluation_options,
    full_text_option,
    json_option,
    memory_option,
    policy_option,
    rehash_option,
    tasks_option,
    threads_option,
    workers_option,
)
from glmexport.foundation.errors import EXIT_PASS
from glmexport.foundation.machine import memory_bytes
from glmexport.foundation.progress import Progress, Silent
from glmexport.report.arithmetic import brief_arithmetic
from glmexport.report.text import brief_size, brief_span

if TYPE_CHECKING:
    from glmexport.foundation.recipe import Recipe
    from glmexport.reference.arithmetic_choice import Wanted
    from glmexport.workflows.job import Job
    from glmexport.workflows.original import Original
    from glmexport.workflows.validate import BuildOptions


@click.command()
@checkpoint_argument
@adapter_option
@rehash_option
@click.option(
    "--target", "target_names", multiple=True, default=("host",), show_default=True,
    help="What the bundle is for: a name from 'glmexport targets list', a .toml file, or host. May be repeated.",
)  # fmt: skip
@click.option("--recipe", help="How to quantize: a name or a .toml file. Default: the target's.")
@budget_options
@click.option(
    "--calibration", "calibration", multiple=True, type=click.Path(path_type=Path),
    help="Text of your own to calibrate on as well (.txt, or .jsonl with 'text' or 'messages'). May be repeated.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where the bundle goes. Default: bundles/NAME.")
@device_option
@memory_option
@policy_option
@evaluation_options
@full_text_option
@tasks_option
@threads_option
@arithmetic_option
@workers_option
@click.option("--force", is_flag=True, help="Replace a bundle that exists.")
@json_option
def build(
    checkpoint: str,
    adapter: str | None,
    rehash: bool,
    target_names: tuple[str, ...],
    recipe: str | None,
    size: int | None,
    bpw: float | None,
    calibration: tuple[Path, ...],
    output: Path | None,
    device_name: str,
    max_memory: int | None,
    policy_path: Path | None,
    evaluation: tuple[Path, ...],
    positions: int,
    questions: int | None,
    full_text: bool,
    task_files: tuple[Path, ...],
    threads: int,
    wanted_arithmetic: Wanted,
    workers: int,
    force: bool,
    as_json: bool,
) -> int:
    """Quantize CHECKPOINT, export it for each target, and validate it against the original.

    CHECKPOINT is a directory, a hub id (owner/name), or demo. Finished decoder blocks are kept until the build is done:
    after an interruption the same command goes on where it stopped.
    """
    from glmexport.cli.verdict import exit_code, show, show_unrun
    from glmexport.foundation.target import open_policy, open_target
    from glmexport.reference.arithmetic_choice import choose_arithmetic
    from glmexport.validation.behaviour.tasks import read_tasks
    from glmexport.validation.conditions import BehaviourPlan, ValidationPlan
    from glmexport.workflows.build import BuiltUnrun
    from glmexport.workflows.build import build as compile_bundles
    from glmexport.workflows.device import open_device
    from glmexport.workflows.job import budget_of, jobs_of
    from glmexport.workflows.original import Original
    from glmexport.workflows.ranks import (
        ToldElsewhere,
        arithmetic_of_all,
        joined_ranks,
        of_this_rank,
        started_by_torchrun,
    )
    from glmexport.workflows.validate import BuildOptions, command_line
    from glmexport.workflows.workers import run_workers

    if workers > 1 and not started_by_torchrun():
        return run_workers(workers, ["-m", "glmexport", *sys.argv[1:]])
    terminal = Terminal()
    device_name, own_threads = of_this_rank(device_name, threads)
    device, given = open_device(device_name), bundle_threads(threads)
    threads = given or own_threads
    try:
        with joined_ranks(device, lambda lost: say("ERROR", lost.message, lost.next_step)) as ranks:
            # One rank tells people of the progress.
            progress: Progress = terminal if ranks.first else Silent()
            policy = open_policy(policy_path) if policy_path else None
            tasks = tuple(read_tasks(task_files)) if task_files else ()
            targets = [open_target(name) for name in dict.fromkeys(target_names)]
            original = Original.open(checkpoint, progress, adapter, rehash=rehash)
            jobs = jobs_of(original, targets, recipe, output, budget_of(size, bpw))
            arithmetic = arithmetic_of_all(ranks, lambda: choose_arithmetic(wanted_arithmetic, threads, terminal))
            options = BuildOptions(
                threads,
                max_memory // workers if max_memory else None,
                calibration=calibration,
                evaluation=evaluation,
                device=device,
                force=force,
                command=command_line(),
                validation=ValidationPlan(
                    positions_per_language=positions,
                    full_text=full_text,
                    max_memory_bytes=max_memory,
                    behaviour=BehaviourPlan(most=questions),
                ),
                policy=policy,
                tasks=tasks,
                bundle_threads=given,
                ranks=ranks,
                arithmetic=arithmetic,
            )
            if ranks.first:
                _announce(terminal, original, jobs, options)
            built = compile_bundles(original, jobs, options, progress)
            if not ranks.first:
                return EXIT_PASS
    except ToldElsewhere as error:
        return error.exit_code
    documents: list[dict[str, object]] = []
    verdicts = []
    for bundle in built:
        document: dict[str, object] = {"bundle": str(bundle.directory), "digest": bundle.manifest.digest()}
        if isinstance(bundle, BuiltUnrun):
            show_unrun(terminal.console, bundle.unrun, bundle.manifest.target, bundle.directory, checkpoint)
            unrun = bundle.unrun
            gates = [gate.model_dump(mode="json") for gate in unrun.gates]
            document |= {"report": None, "verdict": unrun.verdict, "not_run": unrun.lacking, "gates": gates}
            verdicts.append(unrun.verdict)
        else:
            show(terminal.console, bundle.report, bundle.directory)
            # Through text, which is where a number that is not finite becomes a string.
            document |= {"report": json.loads(bundle.report.model_dump_json())}
            verdicts.append(bundle.report.verdict)
        documents.append(document)
    if as_json:
        emit(json.dumps({"bundles": documents}, indent=2, ensure_ascii=False))
    return exit_code(verdicts)


def _announce(terminal: Terminal, original: Original, jobs: Sequence[Job], options: BuildOptions) -> None:
    """Show what is about to be built, and what is expected of it."""
    import torch

    from glmexport.workflows.cost import build_seconds, total
    from glmexport.workflows.device import arithmetic_on
    from glmexport.workflows.device import device_name as name_of
    from glmexport.workflows.estimate import estimate
    from glmexport.workflows.original import formats_of, listed_unused
    from glmexport.workflows.ranks import ranks_here
    from glmexport.workflows.unit_costs import unit_costs

    if remark := crowded(ranks_here(), options.threads):
        terminal.remark(remark)
    torch.set_num_threads(options.threads)
    device, ranks, merged = options.device, options.ranks, original.checkpoint.adapter
    costs = unit_costs(options.arithmetic)
    on_device = costs if device.type == "cpu" else unit_costs(arithmetic_on(device, options.arithmetic), device)
    for job in jobs:
        expected = estimate(original.planned(job.recipe, job.target), options.max_memory_bytes)
        limit_bytes = options.max_memory_bytes
        seconds = total(
            build_seconds(
                original, job.recipe, job.target, options.validation, on_device, costs, limit_bytes, ranks.size
            )
        )
        limit = f", limit {brief_size(options.max_memory_bytes)}" if options.max_memory_bytes else ""
        terminal.facts(
            "Build",
            {
                "checkpoint": f"{original.checkpoint.name} ({original.checkpoint.path})",
                **({"adapter": f"{merged.name} ({merged.path}): {merged.summary}"} if merged else {}),
                "family": f"{original.architecture.family}, {original.checkpoint.parameters / 1e6:,.1f} M parameters, "
                f"{brief_size(original.checkpoint.bytes)}",
                **({"quantized": formats_of(original)} if original.checkpoint.stored.layout else {}),
                "target": f"{job.target.name}: {job.target.summary}",
                "recipe": f"{job.recipe.name}: {job.recipe.summary}",
                "calibration": calibration_text(job.recipe, options.calibration),
                "output": str(job.directory),
                **({"device": name_of(device)} if device.type != "cpu" else {}),
                **({} if ranks.alone else {"ranks": str(ranks.size)}),
                "threads": str(options.threads) + ("" if ranks.alone else " in each rank"),
                "arithmetic": brief_arithmetic(options.arithmetic),
                "memory": f"about {brief_size(expected.peak_memory_bytes)} at the peak"
                + ("" if ranks.alone else " in each rank")
                + limit,
                "bundle": f"about {brief_size(expected.bundle_bytes)}, {expected.bits_per_weight:.2f} bits per weight; "
                f"{brief_size(expected.loaded_bytes)} of memory once it is loaded",
                "time": f"{brief_span(seconds.low, seconds.high)} on this machine"
                + ("; it is busy now" if costs.busy else ""),
            },
        )
        if job.target.probe.compute_capability is None and expected.loaded_bytes > memory_bytes():
            terminal.remark(
                f"This machine has {brief_size(memory_bytes())} of memory: it can build the bundle and check its "
                "weights, and only a larger one can run it."
            )
        for name, reason in listed_unused(original.unused_for(job.target)).items():
            terminal.remark(f"{name} is not used: {reason}.")


def calibration_text(recipe: Recipe, own: Sequence[Path]) -> str:
    """Return what ``recipe`` calibrates on, for people."""
    from glmexport.calibration.corpus import USER

    if recipe.calibration is None:
        return "none: this recipe needs no text"
    shipped = ["shipped corpora"] if set(recipe.calibration.quota) - {USER} else []
    return ", ".join([*shipped, *map(str, own)])
