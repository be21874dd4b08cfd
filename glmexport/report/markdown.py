"""The report as Markdown: for a pull request, a wiki, or a terminal without a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glmexport.report import speed, text
from glmexport.report.arithmetic import told_arithmetic
from glmexport.report.behaviour import LANGUAGE_HEADS, answer_rows, language_row
from glmexport.report.coverage import COVERAGE_HEADS, coverage_rows
from glmexport.report.devices import device_table
from glmexport.report.gfm import code, strong
from glmexport.report.gfm import foreign as _foreign
from glmexport.report.gfm import table as _table
from glmexport.report.looks import LOOK_HEADS, look_rows, told_looks

if TYPE_CHECKING:
    from glmexport.report.document import Report
    from glmexport.results.fidelity import LanguageFidelity
    from glmexport.results.gate import Gate


def render_markdown(report: Report) -> str:
    """Render ``report`` in GitHub's dialect; the same report gives the same text."""
    subject = report.subject
    source: str = _foreign(subject.checkpoint)
    if subject.adapter:
        source += f" with the adapter {_foreign(subject.adapter)}"
    parts = [
        f"# {report.verdict}: {_foreign(subject.bundle)}",
        f"From {source} by recipe {_foreign(subject.recipe)}, validated for target {_foreign(subject.target)} in "
        f"{len(subject.languages)} languages by glmexport {_foreign(report.glmexport_version)}.",
        *_devices(report),
        "## Gates",
        f"Limits: {_foreign(report.policy.source)}; bounds of {text.percent(report.policy.gates.confidence)} each.",
        _table(("Gate", "Language", "Measured", "Bounds", "Limit", "Verdict", "Rests on"), map(_gate, report.gates)),
        "## Quality per language",
        f"The bundle computes in {_foreign(report.fidelity.arithmetic)}.",
        _table(
            ("Language", "Documents", "Positions", "KL mean", "± error", "p99", "p99.9", "Top-1", "ln PPL ratio"),
            map(_language, _rows(report)),
        ),
        *_looks(report),
        *_routing(report),
        *_prompts(report),
        *_behaviour(report),
        *_weights(report),
        "## Size and speed",
        _table(("", "Original", "Bounds", "Bundle", "Bounds", "Bundle against original"), _costs(report)),
        _speed_notes(report),
    ]
    if report.quantization and report.quantization.experts:
        parts += [
            "## Calibration text per expert",
            "Experts of each block by the number of positions that chose them.",
            _table(COVERAGE_HEADS, coverage_rows(report.quantization.experts)),
        ]
    if report.quantization and report.quantization.fallbacks:
        parts += ["## Fallbacks", *(f"- {_foreign(fallback)}" for fallback in report.quantization.fallbacks)]
    parts += [
        "## Provenance",
        _table(
            ("", ""),
            (
                ("Bundle", code(subject.bundle_digest)),
                ("Original", code(subject.checkpoint_digest)),
                ("Evaluation text", code(report.fidelity.text_digest) if report.fidelity.text_digest else "–"),
                ("Original computed by", _foreign(told_arithmetic(report.arithmetic))),
                ("Machine", _foreign(f"{report.machine.processor}, {report.machine.cores or 'unknown'} cores")),
                ("Versions", _foreign(", ".join(f"{name} {version}" for name, version in report.versions.items()))),
            ),
        ),
        "## What this does not show",
        "\n".join(f"- {_foreign(limit)}" for limit in report.limits),
    ]
    return "\n\n".join(parts) + "\n"


def _devices(report: Report) -> list[str]:
    table = device_table(report)
    if table is None or report.detailed is None:
        return []
    verdicts = ("Verdict", *map(strong, table.verdicts))
    rows = ((_foreign(name), *map(_foreign, cells)) for name, cells in table.rows)
    return [
        "## Devices",
        _table(("Class", *map(_foreign, table.classes)), [verdicts, *rows]),
        "\n".join(f"- {_foreign(note)}" for note in table.notes),
        f"What follows is of {_foreign(report.detailed)}.",
    ]


def _gate(gate: Gate) -> tuple[str, ...]:
    value, limit = text.value_and_limit(gate.value, gate.limit, gate.unit)
    bounds = "–"
    if gate.lower is not None and gate.upper is not None:
        bounds = f"{text.bound(gate.lower, gate.unit)} to {text.bound(gate.upper, gate.unit)}"
    language = _foreign(gate.language) if gate.language else "–"
    return (
        _foreign(gate.name),
        language,
        value,
        bounds,
        f"{gate.direction} {limit}",
        strong(gate.verdict),
        _foreign(text.sample(gate)),
    )


def _looks(report: Report) -> list[str]:
    told = told_looks(report.fidelity)
    if told is None:
        return []
    rows = ((_foreign(language), *cells) for language, *cells in look_rows(report.fidelity))
    return ["### How much text was judged", told, _table(LOOK_HEADS, rows)]


def _routing(report: Report) -> list[str]:
    if not report.routing:
        return []
    rows = (
        (str(row.layer), text.number(row.positions), text.percent(row.same_set), text.percent(row.same_experts))
        for row in report.routing
    )
    return ["## Routing", _table(("Block", "Positions", "All experts the same", "Choices the same"), rows)]


def _prompts(report: Report) -> list[str]:
    parity = report.prompts
    if parity is None:
        return []
    told = f"{text.number(parity.compared)} conversations compared, {text.number(len(parity.differences))} differ."
    shown = (
        f"- {_foreign(each.conversation)}, {_foreign(each.language)}: original {_foreign(each.expected)}, "
        f"bundle {_foreign(each.given)}"
        for each in parity.differences[:6]
    )
    return ["## Prompts", "\n".join([told, "", *shown]).rstrip()]


def _behaviour(report: Report) -> list[str]:
    behaviour = report.behaviour
    if behaviour is None:
        return []
    rows = ((_foreign(row.name), row.original, row.bundle, row.note) for row in answer_rows(behaviour))
    languages = ((_foreign(row.language), *language_row(row)) for row in behaviour.languages)
    return [
        "## Free answers",
        _table(("", "Original", "Bundle", "Change"), rows),
        _table(("Language", *LANGUAGE_HEADS), languages),
    ]


def _weights(report: Report) -> list[str]:
    check = report.weights
    if check is None or not check.faults:
        return []
    shown = (f"- {_foreign(fault.tensor)}: {_foreign(fault.detail)}" for fault in check.faults[:20])
    return [
        f"## Weights\n\n{text.number(len(check.faults))} tensors of the graph are not what they should be.",
        "\n".join(shown),
    ]


def _rows(report: Report) -> list[LanguageFidelity]:
    fidelity = report.fidelity
    again = fidelity.noise_floor
    return [
        *fidelity.languages,
        fidelity.overall,
        *([again.model_copy(update={"language": "original, again"})] if again else []),
    ]


def _language(row: LanguageFidelity) -> tuple[str, ...]:
    return (
        _foreign(row.language),
        text.number(row.documents),
        text.number(row.positions),
        text.number(row.kl_mean_nats),
        text.number(row.kl.standard_error, 2),
        text.number(row.kl_p99_nats),
        text.number(row.kl_p999_nats),
        text.percent(row.top1_agreement),
        text.number(row.ln_perplexity_ratio.value, 2),
    )


def _costs(report: Report) -> list[tuple[str, ...]]:
    size = report.size
    return [
        ("On disk", text.size(size.original_bytes), "", text.size(size.bundle_bytes), "", ""),
        *(
            (
                row.name,
                speed.shown_value(row.original, row.unit),
                speed.bounds(row.original, row.unit),
                speed.shown_value(row.bundle, row.unit),
                speed.bounds(row.bundle, row.unit),
                speed.comparison(row),
            )
            for row in speed.speed_rows(report.performance)
        ),
    ]


def _speed_notes(report: Report) -> str:
    performance = report.performance
    if performance is None:
        return f"Speed was not measured: {_foreign(report.performance_absent_because or '')}"
    absent = performance.original_absent_because
    return " ".join(
        (
            f"{text.number(report.size.bits_per_weight)} bits per weight; medians of {performance.rounds} rounds taken "
            f"in turns, with bounds of {text.percent(performance.bundle.ttft_s.confidence)} each. "
            f"{speed.bounded_by(performance)}",
            *([f"The original was not measured: {_foreign(absent)}"] if absent else []),
            _foreign(speed.figure_sources(performance)),
            _foreign(speed.node_placement(performance)),
        )
    )
