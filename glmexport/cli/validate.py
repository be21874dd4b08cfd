"""``glmexport validate``: a bundle against its original, on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import adapter_option, json_option, policy_option, tasks_option, threads_option


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", "checkpoint", help="The checkpoint that the bundle was built from.")
@click.option(
    "--reference", type=click.Path(path_type=Path),
    help="What that checkpoint answered when 'glmexport reference' captured it; instead of --against.",
)  # fmt: skip
@adapter_option
@policy_option
@tasks_option
@threads_option
@json_option
def validate(
    bundle: Path,
    checkpoint: str | None,
    reference: Path | None,
    adapter: str | None,
    policy_path: Path | None,
    task_files: tuple[Path, ...],
    threads: int,
    as_json: bool,
) -> int:
    """Measure how close BUNDLE is to its original and how fast, and write report.json and report.html into it.

    The original is a checkpoint (--against) or what it answered elsewhere (--reference).
    """
    from glmexport.bundle import read_manifest
    from glmexport.cli.verdict import exit_code, show
    from glmexport.compile import BuildOptions, command_line, validate_bundle, validate_captured_bundle
    from glmexport.errors import InputError
    from glmexport.job import Original
    from glmexport.target import open_policy
    from glmexport.validation.behaviour.tasks import read_tasks
    from glmexport.validation.capture import CapturedReference

    terminal = Terminal()
    if (checkpoint is None) == (reference is None):
        raise click.UsageError(
            "Give the original either with --against or with --reference: --against CHECKPOINT measures more, "
            "--reference DIR needs no checkpoint."
        )
    if adapter and checkpoint is None:
        raise InputError("--adapter belongs to --against.", next_step="A reference was captured with its adapter.")
    if task_files and checkpoint is None:
        raise InputError(
            "--tasks belongs to --against: a captured reference does not know what the original answers to them.",
            next_step="Give the checkpoint, or leave the tasks out.",
        )
    policy = open_policy(policy_path) if policy_path else None
    tasks = tuple(read_tasks(task_files)) if task_files else ()
    options = BuildOptions(threads, command=command_line(), policy=policy, tasks=tasks)
    manifest = read_manifest(bundle)

    def told(original: dict[str, str]) -> None:
        terminal.facts(
            "Validate",
            {
                "bundle": str(bundle),
                "digest": manifest.digest(),
                **original,
                "target": manifest.target.name,
                "recipe": manifest.recipe.name,
                "threads": str(threads),
            },
        )

    if reference is not None:
        captured = CapturedReference.open(reference)
        told({"against": f"{captured.capture.source.title} as captured in {reference} ({captured.capture.digest()})"})
        built = validate_captured_bundle(bundle, captured, options, terminal)
    else:
        assert checkpoint is not None
        original = Original.open(checkpoint, terminal, adapter)
        merged = original.checkpoint.adapter
        told(
            {
                "against": f"{original.checkpoint.name} ({original.checkpoint.path})",
                **({"adapter": f"{merged.name} ({merged.path}): {merged.summary}"} if merged else {}),
            }
        )
        built = validate_bundle(bundle, original, options, terminal)
    show(terminal.console, built.report, bundle)
    if as_json:
        emit(built.report.model_dump_json(indent=2))
    return exit_code([built.report.verdict])
