"""The verdict table that build and validate end with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from glmexport.cli.console import titled_table
from glmexport.foundation.errors import EXIT_BLOCK, EXIT_INCONCLUSIVE, EXIT_PASS
from glmexport.foundation.target import Target
from glmexport.report.allocation import summarize
from glmexport.report.behaviour import answer_rows
from glmexport.report.devices import device_table
from glmexport.report.document import HTML_NAME, Report
from glmexport.report.looks import told_looks
from glmexport.report.speed import median_of, only_if_bounded, share_reached, speed_rows
from glmexport.report.text import brief_divergence, brief_ratio, brief_share, brief_size
from glmexport.results.behaviour import Behaviour
from glmexport.results.fidelity import CaptureBound, LanguageFidelity
from glmexport.results.gate import Gate
from glmexport.results.performance import Interval, Performance
from glmexport.results.record import Verdict
from glmexport.results.reference import ReferenceCheck
from glmexport.results.weights import WeightCheck

if TYPE_CHECKING:
    from glmexport.validation.unrun import Unrun

_EXIT = {
    Verdict.PASS: EXIT_PASS,
    Verdict.WARN: EXIT_PASS,
    Verdict.INCONCLUSIVE: EXIT_INCONCLUSIVE,
    Verdict.BLOCK: EXIT_BLOCK,
}
#: Faults that a terminal has room for.
_SHOWN = 8
_STYLE = {
    Verdict.PASS: "bold green",
    Verdict.WARN: "bold yellow",
    Verdict.INCONCLUSIVE: "bold yellow",
    Verdict.BLOCK: "bold red",
}


def exit_code(verdicts: list[Verdict]) -> int:
    """Return the exit code of the gravest verdict."""
    gravest = max(verdicts, key=lambda verdict: verdict.severity)
    return _EXIT[gravest]


def show(console: Console, report: Report, directory: Path) -> None:
    """Show fidelity per language, size and speed beside the original, gates, and where to read more."""
    if report.devices:
        console.print(_devices(report))
    console.print(_fidelity(report))
    if report.fidelity.looks:
        console.print(told_looks(report.fidelity), style="dim", markup=False)
    if report.fidelity.capture:
        console.print(_capture(report.fidelity.capture), style="dim")
    console.print(_shares(report))
    if report.behaviour:
        console.print(_answers(report.behaviour))
    console.print(_spending(report))
    console.print(_cost(report))
    console.print(_conditions(report), style="dim")
    if report.reference:
        console.print(told_check(report.reference), style="dim", markup=False)
    console.print(_gates(report.policy.source, report.gates))
    if report.weights and report.weights.faults:
        console.print(_faults(report.weights))
    console.print(Text.assemble("verdict  ", _verdict(report.verdict)))
    console.print(f"bundle   {directory}", soft_wrap=True)
    console.print(f"report   {directory / HTML_NAME}", soft_wrap=True)


#: Name, scale and format of a row in a terminal.
_SPEED_FORMS = {
    "Loading": ("load (s)", 1, ".2f"),
    "Time to first token": ("TTFT (ms)", 1e3, ".1f"),
    "Prefill": ("prefill (tokens/s)", 1, ".0f"),
    "Decode": ("decode (tokens/s)", 1, ".4g"),
    "Peak memory": ("peak memory (MiB)", 1 / 2**20, ".0f"),
    "Energy per decoded token": ("energy (J/token)", 1, ".3g"),
}


def _verdict(verdict: Verdict) -> Text:
    return Text(verdict, _STYLE[verdict])


def _devices(report: Report) -> Group:
    """A column for each class, and what did not run."""
    found = device_table(report)
    assert found is not None
    table = titled_table("\nDevices", "class", *found.classes)
    table.add_row("verdict", *map(_verdict, found.verdicts))
    for name, cells in found.rows:
        table.add_row(Text(name), *map(Text, cells))
    return Group(table, *(Text(note, style="yellow") for note in found.notes))


def _fidelity(report: Report) -> Table:
    where = f" on {report.detailed}" if report.detailed else ""
    table = titled_table(
        f"\nFidelity{where}: {report.fidelity.arithmetic}",
        "language", "positions", "perplexity original", "bundle", "KL mean (nats)", "KL p99 (nats)", "top-1 agreement",
    )  # fmt: skip
    early = {looks.language: looks for looks in report.fidelity.looks if looks.ended_early}
    for row in report.fidelity.languages:
        mark = " worst" if row.language == report.fidelity.worst_language else ""
        positions, *figures = _figures(row)
        if row.language in early:
            positions += f" of {early[row.language].whole.positions}"
        table.add_row(row.language + mark, positions, *figures, style="yellow" if mark else "")
    table.add_section()
    table.add_row("all", *_figures(report.fidelity.overall), style="bold")
    if report.fidelity.noise_floor:
        table.add_row("original, again", *_figures(report.fidelity.noise_floor), style="dim")
    return table


def _capture(bound: CaptureBound) -> str:
    return (
        f"lower bounds: of the original, its {bound.top_k} most likely tokens were captured; at "
        f"{bound.audit_positions} positions {brief_divergence(bound.kl_mean_partition_nats, 5)} nats so and "
        f"{brief_divergence(bound.kl_mean_nats, 5)} over the whole vocabulary"
    )


def _figures(row: LanguageFidelity) -> tuple[str, ...]:
    return (
        str(row.positions),
        f"{row.perplexity_original:.2f}",
        f"{row.perplexity_bundle:.2f}",
        brief_divergence(row.kl_mean_nats),
        brief_divergence(row.kl_p99_nats, 3),
        brief_share(row.top1_agreement),
    )


def _shares(report: Report) -> Table | str:
    if not report.shares:
        return ""
    table = titled_table("\nWhere the divergence comes from", "part", "KL mean added (nats)", "")
    for share in report.shares:
        table.add_row(share.name, f"{share.kl_mean_nats:+.4f}", share.note)
    return table


def _answers(behaviour: Behaviour) -> Table:
    table = titled_table(f"\nFree answers: {behaviour.overall.answers} prompts", "", "original", "bundle", "")
    for row in answer_rows(behaviour):
        table.add_row(Text(row.name), row.original or "-", row.bundle, row.note)
    return table


def _spending(report: Report) -> Table | str:
    spending = summarize((), report.quantization.groups).spending if report.quantization else None
    if spending is None:
        return ""
    table = titled_table(
        "\nWhere the bits went", "format", "groups of matrices", "share of the bits", "KL mean alone (nats)"
    )
    for row in spending.formats:
        share = row.stored_bits / spending.stored_bits
        table.add_row(row.format, str(row.groups), brief_share(share), f"{row.loss_nats:.4f}")
    return table


def _cost(report: Report) -> Table:
    table = titled_table("\nSize and speed", "", "original", "bounds", "bundle", "bounds", "ratio", "bounds")
    size = report.size
    before = size.original_bytes * 8 / size.parameters if size.parameters else math.nan
    table.add_row(
        "size", brief_size(size.original_bytes), "", brief_size(size.bundle_bytes), "",
        _times(size.bundle_bytes, size.original_bytes),
    )  # fmt: skip
    table.add_row(
        "bits per weight", f"{before:.2f}", "", f"{size.bits_per_weight:.2f}", "",
        _times(size.bits_per_weight, before),
    )  # fmt: skip
    for row in speed_rows(report.performance):
        name, scale, form = _SPEED_FORMS[row.name]
        sides = [
            shown
            for cell in (row.original, row.bundle)
            for shown in (("-", "") if cell is None else _cells(cell, scale, form))
        ]
        table.add_row(name, *sides, *(("", "") if row.ratio is None else _cells(row.ratio, 1, ".2f", "x")))
    return table


def _times(value: float, base: float) -> str:
    return brief_ratio(value / base) if base else "-"


def _cells(cell: Interval | float, scale: float, form: str, unit: str = "") -> tuple[str, str]:
    sure = only_if_bounded(cell)
    return (
        f"{median_of(cell) * scale:{form}}{unit}",
        f"{sure.lower * scale:{form}} to {sure.upper * scale:{form}}" if sure else "",
    )


def _conditions(report: Report) -> str:
    speed = report.performance
    if speed is None:
        return f"speed was not measured: {report.performance_absent_because}"
    original = speed.original
    runtimes = speed.bundle.runtime + (
        f" against {original.runtime}" if original else f"; {speed.original_absent_because}"
    )
    energy = speed.bundle.energy_absent_because
    return (
        f"{runtimes}, {speed.bundle.threads} threads; {speed.prompt_tokens} prompt and {speed.generated_tokens} "
        f"generated tokens, medians of {speed.rounds} rounds in turns; {_bound(speed)}; "
        f"peak memory by {speed.bundle.peak_memory_source}"
        + (f"; energy not measured: {energy}" if energy else "")
    )  # fmt: skip


def told_check(check: ReferenceCheck) -> str:
    """Return what comparing the original with transformers' whole model gave, or why that was not done."""
    if check.absent_because is not None:
        return f"original not checked against transformers' whole model: {check.absent_because}"
    return (
        f"original checked against transformers' whole model: largest difference of two logits "
        f"{check.max_difference:.2g} at {check.positions} positions, at most {check.limit:.2g}"
    )


def _bound(speed: Performance) -> str:
    if speed.roofline_decode_tokens_per_s is None:
        return "how fast memory is read is not known"
    return (
        f"memory bandwidth bounds decoding at {speed.roofline_decode_tokens_per_s:.0f} tokens/s, of which "
        f"{share_reached(speed)} is reached"
    )


def _faults(check: WeightCheck) -> Table:
    table = titled_table("\nTensors that are not what they should be", "tensor", "what is wrong")
    for fault in check.faults[:_SHOWN]:
        table.add_row(Text(fault.tensor), Text(fault.detail))
    if len(check.faults) > _SHOWN:
        table.add_row(f"and {len(check.faults) - _SHOWN} more", "in the report")
    return table


def show_unrun(console: Console, unrun: Unrun, target: Target, directory: Path, checkpoint: str) -> None:
    """Show the gates of a bundle that was not run, why it was not, and how it is validated where it can be."""
    console.print(told_check(unrun.reference), style="dim", markup=False)
    console.print(_gates("what needs no run", unrun.gates))
    for reason in unrun.lacking:
        console.print(f"not run on the device: {reason}", soft_wrap=True, markup=False)
    console.print(Text.assemble("verdict  ", _verdict(unrun.verdict)))
    console.print(f"bundle   {directory}", soft_wrap=True)
    step = f"Validate it where {target.provider.package} has {target.provider.name}, and the memory: "
    step += f"glmexport validate {directory.name} --against {checkpoint}"
    if target.provider.runtime == "onnxruntime-web":
        step += " --device browser"
    console.print(step, soft_wrap=True, markup=False)


def _gates(source: str, gates: Iterable[Gate]) -> Table:
    table = titled_table(
        f"\nGates: {source}", "gate", "language", "measured", "bounds", "", "limit", "verdict"
    )
    for gate in gates:
        table.add_row(
            gate.name,
            gate.language or "-",
            brief_size(gate.value) if gate.unit == "bytes" else f"{gate.value:.4g}",
            "-" if gate.lower is None or gate.upper is None else f"{gate.lower:.4g} to {gate.upper:.4g}",
            gate.direction,
            brief_size(gate.limit) if gate.unit == "bytes" else f"{gate.limit:g}",
            Text.assemble(
                _verdict(gate.verdict),
                f" (about {gate.documents_needed} {gate.needed_unit} would decide)" if gate.documents_needed else "",
            ),
        )
    return table
