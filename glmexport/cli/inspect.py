"""``glmexport inspect``: the content of a checkpoint and the cost of building it, without reading its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.table import Table

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import (
    adapter_option,
    arithmetic_option,
    budget_options,
    checkpoint_argument,
    crowded,
    json_option,
    memory_option,
    threads_of_each,
    threads_option,
    workers_option,
)
from glmexport.report.arithmetic import brief_arithmetic
from glmexport.report.text import brief_share, brief_size, brief_span

if TYPE_CHECKING:
    from glmexport.reference.arithmetic_choice import Wanted
    from glmexport.workflows.inspect import DraftLayer, Inspection, MixtureSummary, TargetEstimate, Unfinished
    from glmexport.workflows.original import Original

#: The remark beside an estimate of time that other work disturbs.
BUSY = (
    "This machine is busy with other work now: a build beside it takes longer than estimated, and costs that are "
    "measured meanwhile are not kept."
)


@click.command()
@checkpoint_argument
@adapter_option
@click.option("--recipe", help="Estimate for this recipe instead of each target's default.")
@budget_options
@memory_option
@threads_option
@arithmetic_option
@workers_option
@click.option("--measure", is_flag=True, help="Measure anew what work costs on this machine, which is kept otherwise.")
@json_option
def inspect(
    checkpoint: str,
    adapter: str | None,
    recipe: str | None,
    size: int | None,
    bpw: float | None,
    max_memory: int | None,
    threads: int,
    wanted_arithmetic: Wanted,
    workers: int,
    measure: bool,
    as_json: bool,
) -> None:
    """Show family, parameters by part, context and tokenizer of CHECKPOINT, and an estimate for every target."""
    from glmexport.architecture.registry import UNFINISHED
    from glmexport.checkpoint.checkpoint import Checkpoint
    from glmexport.reference.arithmetic_choice import choose_arithmetic
    from glmexport.workflows.inspect import inspect_original, inspect_unfinished
    from glmexport.workflows.job import budget_of
    from glmexport.workflows.original import Original

    terminal, budget = Terminal(), budget_of(size, bpw)
    opened = Checkpoint.open(checkpoint, None, adapter)
    if opened.model_type in UNFINISHED:
        known = inspect_unfinished(opened, UNFINISHED[opened.model_type](opened))
        if as_json:
            emit(json.dumps(asdict(known), indent=2, ensure_ascii=False))
        else:
            _show_unfinished(terminal, known)
        return
    original = Original.open(checkpoint, terminal, adapter)
    own_threads = threads_of_each(threads, workers)
    if remark := crowded(workers, own_threads):
        terminal.remark(remark)
    arithmetic = choose_arithmetic(wanted_arithmetic, own_threads, terminal)
    inspection = inspect_original(
        original,
        recipe,
        max_memory // workers if max_memory else None,
        arithmetic,
        budget,
        threads=own_threads,
        ranks=workers,
        measure=measure,
    )
    if as_json:
        emit(json.dumps(asdict(inspection), indent=2, ensure_ascii=False))
        return
    terminal.facts(
        inspection.name, {**_facts(inspection, original), "arithmetic": brief_arithmetic(arithmetic)}
    )
    terminal.console.print(_parts_table(inspection.parameters))
    terminal.console.print(_estimates_table(inspection.estimates))
    if inspection.busy:
        terminal.remark(BUSY)
    for row in inspection.estimates:
        if row.refused:
            terminal.remark(f"{row.target}: {row.refused}")


def _show_unfinished(terminal: Terminal, known: Unfinished) -> None:
    facts = {
        "path": known.path,
        "family": f"{known.family}, which cannot be built yet",
        "parameters": f"{known.parameters['all']:,}",
        "stored": f"{brief_size(known.bytes)} of {', '.join(known.dtypes)}",
        **{f"missing {number}": part for number, part in enumerate(known.missing, 1)},
    }
    terminal.facts(known.name, facts)


def _facts(inspection: Inspection, original: Original) -> dict[str, str]:
    """Return what people read of a checkpoint, by name."""
    from glmexport.workflows.original import formats_of, listed_unused

    tokenizer, merged = inspection.tokenizer, original.checkpoint.adapter
    return {
        "path": inspection.path,
        **({"adapter": f"{merged.name} ({merged.path}): {merged.summary}"} if merged else {}),
        "family": inspection.family,
        "layers": str(inspection.layers),
        **({"experts": _experts(inspection.experts)} if inspection.experts else {}),
        "context": f"{inspection.context_length:,} tokens",
        **({"quantized": formats_of(original)} if inspection.quantization else {}),
        "stored": f"{brief_size(inspection.bytes)} of {', '.join(inspection.dtypes)}",
        "KV cache": _cache(inspection),
        "vocabulary": f"{tokenizer.vocabulary:,} tokens",
        "chat template": "yes" if tokenizer.chat_template else "no",
        "prefix": " ".join(tokenizer.prefix) or "none",
        "special tokens": " ".join(tokenizer.special_tokens),
        "tokens a character": ", ".join(
            f"{name} {value:.2f}" for name, value in tokenizer.tokens_per_character.items()
        ),
        **({"MTP layer": _drafting(inspection.token_prediction)} if inspection.token_prediction else {}),
        **{f"unused {name}": reason for name, reason in listed_unused(inspection.unused).items()},
    }


def _drafting(found: DraftLayer) -> str:
    from glmexport.workflows.inspect import DRAFTS

    by_fate: dict[str, list[str]] = {}
    for target, fate in found.targets.items():
        by_fate.setdefault(fate, []).append(target)
    told = "; ".join(
        f"{', '.join(names)}: {'a draft graph, for run --speculate mtp' if fate == DRAFTS else f'unused, it {fate}'}"
        for fate, names in by_fate.items()
    )
    return f"layer {found.layer}, {found.tensors} tensors. {told}"


def _cache(inspection: Inspection) -> str:
    heads, latents = inspection.kv_bytes_per_token, inspection.latent_kv_bytes_per_token
    if latents is None:
        return f"{heads:,} bytes a token in fp32"
    return f"{latents:,} bytes a token in fp32 as latents, {heads:,} as keys and values of every head"


def _experts(experts: MixtureSummary) -> str:
    groups = f", in {experts.groups} groups" if experts.groups > 1 else ""
    return f"{experts.chosen} of {experts.routed} a token in {experts.layers} layers{groups}"


def _parts_table(parts: dict[str, int]) -> Table:
    table = Table(
        title="Parameters",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for column in ("part", "parameters", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, count in parts.items():
        table.add_row(name, f"{count:,}", brief_share(count / parts["all"]))
    return table


def _estimates_table(rows: Sequence[TargetEstimate]) -> Table:
    table = Table(
        title="\nEstimates for this machine",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for column in ("target", "recipe", "bundle", "bits per weight", "context", "KV a token", "peak memory", "time"):
        table.add_column(column, justify="left" if column in ("target", "recipe") else "right")
    for row in rows:
        if row.refused:
            continue
        table.add_row(
            row.target,
            row.recipe,
            brief_size(row.bundle_bytes),
            f"{row.bits_per_weight:.2f}",
            f"{row.context_length:,}",
            f"{row.cache_bytes_per_token:,} B",
            brief_size(row.peak_memory_bytes),
            brief_span(row.seconds.low, row.seconds.high),
        )
    return table
