"""``glmexport validate``: a bundle against its original, on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import adapter_option, json_option, policy_option, threads_option


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", "checkpoint", required=True, help="The checkpoint that the bundle was built from.")
@adapter_option
@policy_option
@threads_option
@json_option
def validate(
    bundle: Path, checkpoint: str, adapter: str | None, policy_path: Path | None, threads: int, as_json: bool
) -> int:
    """Measure how close BUNDLE is to its original and how fast, and write report.json and report.html into it."""
    from glmexport.bundle import read_manifest
    from glmexport.cli.verdict import exit_code, show
    from glmexport.compile import BuildOptions, command_line, validate_bundle
    from glmexport.job import Original
    from glmexport.target import open_policy

    terminal = Terminal()
    policy = open_policy(policy_path) if policy_path else None
    manifest = read_manifest(bundle)
    original = Original.open(checkpoint, terminal, adapter)
    merged = original.checkpoint.adapter
    terminal.facts(
        "Validate",
        {
            "bundle": str(bundle),
            "digest": manifest.digest(),
            "against": f"{original.checkpoint.name} ({original.checkpoint.path})",
            **({"adapter": f"{merged.name} ({merged.path}): {merged.summary}"} if merged else {}),
            "target": manifest.target.name,
            "recipe": manifest.recipe.name,
            "threads": str(threads),
        },
    )
    options = BuildOptions(threads, command=command_line(), policy=policy)
    built = validate_bundle(bundle, original, options, terminal)
    show(terminal.console, built.report, bundle)
    if as_json:
        emit(built.report.model_dump_json(indent=2))
    return exit_code([built.report.verdict])
