"""``glmexport reference``: the original's answers, captured once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import (
    adapter_option,
    arithmetic_option,
    checkpoint_argument,
    evaluation_options,
    json_option,
    rehash_option,
    threads_option,
)
from glmexport.report.arithmetic import brief_arithmetic
from glmexport.report.text import brief_size

if TYPE_CHECKING:
    from glmexport.reference.arithmetic_choice import Wanted


@click.command()
@checkpoint_argument
@adapter_option
@rehash_option
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the answers go.")
@click.option(
    "--top-k", type=click.IntRange(min=1), default=1024, show_default=True,
    help="Most likely tokens kept at each position; of all others, what they have together.",
)  # fmt: skip
@click.option(
    "--draft", metavar="BUNDLE", type=click.Path(path_type=Path),
    help="A bundle of CHECKPOINT to draft its free answers, which are kept then; the better it is, the faster.",
)  # fmt: skip
@evaluation_options
@threads_option
@arithmetic_option
@click.option("--force", is_flag=True, help="Replace a captured reference that exists.")
@json_option
def reference(
    checkpoint: str,
    adapter: str | None,
    rehash: bool,
    output: Path,
    top_k: int,
    draft: Path | None,
    evaluation: tuple[Path, ...],
    positions: int,
    questions: int | None,
    threads: int,
    wanted_arithmetic: Wanted,
    force: bool,
    as_json: bool,
) -> None:
    """Ask CHECKPOINT about the evaluation text and keep its answers, for 'validate --reference' on any machine.

    One block is in memory at a time. Finished blocks are kept until the end: after an interruption the same command
    goes on where it stopped.
    """
    from glmexport.bundle.bundle import Bundle
    from glmexport.cli.verdict import told_check
    from glmexport.reference.arithmetic_choice import choose_arithmetic
    from glmexport.validation.conditions import BehaviourPlan, ValidationPlan
    from glmexport.workflows.capture import CaptureOptions, capture_reference
    from glmexport.workflows.original import Original

    terminal = Terminal()
    original = Original.open(checkpoint, terminal, adapter, rehash=rehash)
    merged = original.checkpoint.adapter
    arithmetic = choose_arithmetic(wanted_arithmetic, threads, terminal)
    terminal.facts(
        "Reference",
        {
            "checkpoint": f"{original.checkpoint.name} ({original.checkpoint.path})",
            **({"adapter": f"{merged.name} ({merged.path}): {merged.summary}"} if merged else {}),
            "output": str(output),
            "threads": str(threads),
            "arithmetic": brief_arithmetic(arithmetic),
        },
    )
    plan = ValidationPlan(positions_per_language=positions, behaviour=BehaviourPlan(most=questions))
    drafting = Bundle.open(draft) if draft else None
    options = CaptureOptions(threads, plan, top_k, force, drafting, evaluation, arithmetic)
    captured = capture_reference(original, output, options, terminal)
    positions = sum(text.positions for text in captured.texts)
    size = sum(entry.size for entry in captured.files)
    terminal.facts(
        "Captured",
        {
            "reference": str(output),
            "digest": captured.digest(),
            "positions": f"{positions:,} of {len(captured.texts)} documents in "
            f"{len({text.language for text in captured.texts})} languages",
            "kept": f"{min(captured.top_k, captured.vocabulary_size)} of {captured.vocabulary_size} tokens a position; "
            f"all others together have {captured.tail_mass:.2%}",
            "free answers": "none; --draft BUNDLE has them captured too"
            if captured.answers is None
            else f"{len(captured.answers)} prompts",
            "size": brief_size(size),
        },
    )
    if captured.reference_check:
        terminal.remark(f"{told_check(captured.reference_check)}.")
    if as_json:
        document = {"reference": str(output), "digest": captured.digest(), "positions": positions, "bytes": size}
        document["answers"] = None if captured.answers is None else len(captured.answers)
        emit(json.dumps(document, indent=2, ensure_ascii=False))
