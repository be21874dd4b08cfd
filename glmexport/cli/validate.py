"""``glmexport validate``: a bundle against its original, on this machine or on others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import (
    adapter_option,
    arithmetic_option,
    bundle_threads,
    evaluation_options,
    full_text_option,
    json_option,
    policy_option,
    rehash_option,
    tasks_option,
    threads_option,
    trust_options,
)
from glmexport.report.arithmetic import brief_arithmetic

if TYPE_CHECKING:
    from glmexport.reference.arithmetic_choice import Wanted
    from glmexport.release.opening import Trust
    from glmexport.workflows.original import Original


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", "checkpoint", help="The checkpoint that the bundle was built from.")
@click.option(
    "--reference", type=click.Path(path_type=Path),
    help="What that checkpoint answered when 'glmexport reference' captured it; instead of --against.",
)  # fmt: skip
@adapter_option
@rehash_option
@policy_option
@evaluation_options
@full_text_option
@tasks_option
@click.option(
    "--plan", "only_plan", is_flag=True,
    help="Only say how much text the gates need, and how long a validation takes on this machine.",
)  # fmt: skip
@click.option(
    "--device", "devices", multiple=True, metavar="DEVICE",
    help="Where the bundle runs, instead of in this process: local, ssh://user@host[:port], qemu-arm64[:DIR], browser, "
    "kit:FILE.zip to carry to a device, kit-result:FILE.zip that it brought back; repeatable (README, 'On devices').",
)
@click.option(
    "--fleet", type=click.Path(path_type=Path), metavar="FILE",
    help="A .toml file of devices to ask side by side.",
)
@trust_options
@threads_option
@arithmetic_option
@json_option
def validate(
    bundle: Path,
    checkpoint: str | None,
    reference: Path | None,
    adapter: str | None,
    rehash: bool,
    policy_path: Path | None,
    evaluation: tuple[Path, ...],
    positions: int,
    questions: int | None,
    full_text: bool,
    task_files: tuple[Path, ...],
    only_plan: bool,
    devices: tuple[str, ...],
    fleet: Path | None,
    trust: Trust,
    threads: int,
    wanted_arithmetic: Wanted,
    as_json: bool,
) -> int:
    """Measure how close BUNDLE is to its original and how fast, and write report.json and report.html into it.

    The original is a checkpoint (--against) or what it answered elsewhere (--reference). With --device or --fleet the
    same job runs on each device, and the worst verdict is the whole's.
    """
    from glmexport.bundle.bundle import Bundle
    from glmexport.cli.plan import show_plan
    from glmexport.cli.signature import telling_of_signature
    from glmexport.cli.verdict import exit_code, show
    from glmexport.foundation.errors import EXIT_PASS
    from glmexport.foundation.target import open_policy
    from glmexport.reference.arithmetic_choice import choose_arithmetic
    from glmexport.validation.behaviour.tasks import read_tasks
    from glmexport.validation.capture import CapturedReference
    from glmexport.validation.conditions import BehaviourPlan, ValidationPlan
    from glmexport.workflows.original import Original
    from glmexport.workflows.plan import plan_bundle
    from glmexport.workflows.validate import (
        BuildOptions,
        command_line,
        validate_bundle,
        validate_captured_bundle,
    )

    terminal = Terminal()
    _require_one_original(checkpoint, reference)
    if checkpoint is None:
        _refuse_what_needs_the_original(
            {
                "--adapter": adapter,
                "--rehash": rehash,
                "--evaluation": evaluation,
                "--tasks": task_files,
                "--questions": questions is not None,
            }
        )
    if devices or fleet:
        _refuse_beside_devices({"--tasks": task_files, "--plan": only_plan})
    options = BuildOptions(
        threads,
        evaluation=evaluation,
        command=command_line(),
        validation=ValidationPlan(
            positions_per_language=positions, full_text=full_text, behaviour=BehaviourPlan(most=questions)
        ),
        policy=open_policy(policy_path) if policy_path else None,
        tasks=tuple(read_tasks(task_files)) if task_files else (),
        bundle_threads=bundle_threads(threads),
        trust=trust,
    )
    opened = Bundle.open(bundle)
    original: Original | CapturedReference
    if reference is not None:
        original = CapturedReference.open(reference)
        name, digest = original.capture.source.title, original.capture.digest()
        against = {"against": f"{name} as captured in {reference} ({digest})"}
    else:
        assert checkpoint is not None
        original = Original.open(checkpoint, terminal, adapter, rehash=rehash)
        options = replace(options, arithmetic=choose_arithmetic(wanted_arithmetic, threads, terminal))
        against = _original_facts(original) | {"arithmetic": brief_arithmetic(options.arithmetic)}
    terminal.facts(
        "Plan" if only_plan else "Validate",
        {
            "bundle": str(bundle),
            "digest": opened.digest,
            **against,
            "target": opened.manifest.target.name,
            "recipe": opened.manifest.recipe.name,
            "threads": f"{options.threads_for(opened.target)} of the bundle, {threads} of all else",
            **({"devices": ", ".join([*devices, *([str(fleet)] if fleet else [])])} if devices or fleet else {}),
        },
    )
    if only_plan:
        plan = plan_bundle(opened, original, options, terminal)
        show_plan(terminal.console, plan)
        if as_json:
            emit(plan.model_dump_json(indent=2))
        return EXIT_PASS
    if devices or fleet:
        from glmexport.cli.on_devices import on_devices

        with telling_of_signature(terminal, bundle):
            return on_devices(opened, original, devices, fleet, options.bundle_threads, options, terminal, as_json)
    with telling_of_signature(terminal, bundle):
        if isinstance(original, Original):
            built = validate_bundle(opened, original, options, terminal)
        else:
            built = validate_captured_bundle(opened, original, options, terminal)
    show(terminal.console, built.report, bundle)
    if as_json:
        emit(built.report.model_dump_json(indent=2))
    return exit_code([built.report.verdict])


def _require_one_original(checkpoint: str | None, reference: Path | None) -> None:
    if (checkpoint is None) == (reference is None):
        raise click.UsageError(
            "Give the original either with --against or with --reference: --against CHECKPOINT measures more, "
            "--reference DIR needs no checkpoint."
        )


def _refuse_what_needs_the_original(given: dict[str, object]) -> None:
    for name, value in given.items():
        if value:
            raise click.UsageError(f"{name} belongs to --against: what was captured cannot be asked anything else.")


def _refuse_beside_devices(given: dict[str, object]) -> None:
    for name, value in given.items():
        if value:
            raise click.UsageError(f"{name} is for this process: devices are asked what was captured, and for speed.")


def _original_facts(original: Original) -> dict[str, str]:
    merged = original.checkpoint.adapter
    return {
        "against": f"{original.checkpoint.name} ({original.checkpoint.path})",
        **({"adapter": f"{merged.name} ({merged.path}): {merged.summary}"} if merged else {}),
    }
