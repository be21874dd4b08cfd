"""The report as one page: no network, no script, nothing beside it needed to read or print it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from glmexport.foundation.languages import language_name
from glmexport.foundation.untrusted import visible
from glmexport.report import charts, speed, text
from glmexport.report.allocation import summarize
from glmexport.report.arithmetic import told_arithmetic
from glmexport.report.behaviour import LANGUAGE_HEADS, answer_rows, language_row, question_kind, split_common_prefix
from glmexport.report.coverage import COVERAGE_HEADS, coverage_rows
from glmexport.report.devices import device_table
from glmexport.report.looks import LOOK_HEADS, look_rows, told_looks
from glmexport.results.fidelity import LanguageFidelity
from glmexport.results.gate import Gate
from glmexport.results.record import Verdict

if TYPE_CHECKING:
    from glmexport.report.document import Report

_MARKS = {Verdict.PASS: "✓", Verdict.WARN: "!", Verdict.BLOCK: "✕", Verdict.INCONCLUSIVE: "?"}
_MEANINGS = {
    Verdict.PASS: "Every limit set for this bundle holds, as surely as its policy asks.",
    Verdict.WARN: "No limit is broken, but a measurement asks for a decision by a person before deployment.",
    Verdict.BLOCK: "A limit is broken. Do not deploy this bundle on this target.",
    Verdict.INCONCLUSIVE: "What was measured does not suffice to decide. This is not a pass.",
}


def render_html(report: Report) -> str:
    """Render ``report`` as a self-contained HTML document; the same report gives the same text."""
    gates = sorted(report.gates, key=lambda gate: -gate.verdict.severity)
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            mark=_MARKS[report.verdict],
            marks=_MARKS,
            meaning=_MEANINGS[report.verdict],
            tally=_tally(report.gates),
            gates=gates,
            languages=_by_divergence(report.fidelity.languages),
            divergence_chart=_divergence_chart(report),
            perplexity_chart=_perplexity_chart(report),
            share_chart=_share_chart(report),
            share_sum=sum(share.kl_mean_nats for share in report.shares),
            histogram=_histogram(report),
            speed_rows=speed.speed_rows(report.performance),
            speed=speed,
            devices=device_table(report),
            decode_chart=_decode_chart(report),
            allocation=(
                summarize(report.quantization.linears, report.quantization.groups) if report.quantization else None
            ),
            coverage_heads=COVERAGE_HEADS,
            coverage=coverage_rows(report.quantization.experts) if report.quantization else [],
            margin_text=_margin_text,
            answer_rows=answer_rows(report.behaviour) if report.behaviour else [],
            told_looks=told_looks(report.fidelity),
            look_heads=LOOK_HEADS,
            look_rows=look_rows(report.fidelity),
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    environment.globals.update(
        answer_heads=LANGUAGE_HEADS,
        kind=question_kind,
        language_row=language_row,
        margin=_margin,
        parted=split_common_prefix,
        sample=text.sample,
        part_of=_part_of,
        quotient=_quotient,
        value_and_limit=text.value_and_limit,
    )
    environment.filters.update(
        arithmetic=told_arithmetic,
        bandwidth=text.bandwidth,
        bound=text.bound,
        bytes=text.size,
        count=text.count,
        duration=text.duration,
        foreign=_foreign,
        language=language_name,
        number=text.number,
        percent=text.percent,
        ratio=text.ratio,
        token=_token,
        visible=visible,
    )
    return environment


def _shown(value: object) -> object:
    """Return a value that a template writes, so that nothing is hidden in it if it is not HTML."""
    return visible(value, lines=True) if isinstance(value, str) and not isinstance(value, Markup) else value


def _foreign(words: str) -> Markup:
    """Text that is not ours: nothing hidden in it, and its direction kept to itself."""
    return Markup('<bdi dir="auto">{}</bdi>').format(visible(words))


def _token(words: str, language: str) -> Markup:
    return Markup('<bdi dir="auto" lang="{}" class="token">{}</bdi>').format(visible(language), text.token(words))


def _part_of(part: float, whole: float) -> str:
    return text.percent(part / whole) if whole and math.isfinite(part / whole) else "–"


def _quotient(value: float, base: float) -> str:
    """A ratio near 1, to the digits that tell it from 1."""
    return text.number(value / base, 4) if base and math.isfinite(value / base) else "–"


def _tally(gates: tuple[Gate, ...]) -> str:
    """Return the number of gates with each verdict, the worst first."""
    counts = [(verdict, sum(gate.verdict is verdict for gate in gates)) for verdict in Verdict]
    counts.sort(key=lambda item: -item[0].severity)
    parts = [f"{number} {verdict}" for verdict, number in counts if number]
    noun = "gate" if len(gates) == 1 else "gates"
    return f"{len(gates)} {noun}: {', '.join(parts)}" if parts else "No gate was evaluated"


@dataclass(frozen=True)
class _Measure:
    """A gate as its margin is measured. Of a share that has to be large, what is missing counts: 94 % where 90 % are
    asked for leaves four tenths of what may be missing, and not 4 %.
    """

    value: float
    limit: float
    direction: Literal["at most", "at least"]
    lower: float | None
    upper: float | None

    @classmethod
    def of(cls, gate: Gate) -> _Measure:
        if gate.unit != "share" or gate.direction == "at most" or gate.limit >= 1:
            return cls(gate.value, gate.limit, gate.direction, gate.lower, gate.upper)
        lower, upper = (None if end is None else 1 - end for end in (gate.upper, gate.lower))
        return cls(1 - gate.value, 1 - gate.limit, "at most", lower, upper)


def _margin(gate: Gate) -> Markup:
    measure = _Measure.of(gate)
    return charts.margin(measure.value, measure.limit, measure.direction, measure.lower, measure.upper)


def _margin_text(gate: Gate) -> str:
    measure = _Measure.of(gate)
    room = text.headroom(measure.value, measure.limit, measure.direction)
    if room is None:
        if gate.value == gate.limit:
            return "at the limit"
        return "within the limit" if gate.holds else "beyond the limit"
    if room == 0:
        return "at the limit"
    if room > 0:
        return f"{text.percent(room, 2)} to spare"
    return f"{text.percent(-room, 2)} {'too much' if measure.direction == 'at most' else 'short'}"


def _by_divergence(languages: tuple[LanguageFidelity, ...]) -> list[LanguageFidelity]:
    def key(row: LanguageFidelity) -> float:
        return -math.inf if math.isnan(row.kl_mean_nats) else -row.kl_mean_nats

    return sorted(languages, key=lambda row: (key(row), row.language))


def _divergence_chart(report: Report) -> Markup:
    fidelity = report.fidelity
    rows = []
    for language in _by_divergence(fidelity.languages):
        worst = language.language == fidelity.worst_language
        words = text.number(language.kl_mean_nats)
        rows.append(
            charts.Bar(
                language_name(language.language),
                ((0.0, language.kl_mean_nats),),
                f"{words} worst" if worst else words,
                "worst" if worst else "",
            )
        )
    return charts.bars("divergence", "Divergence by language", "mean KL divergence, nats per token", rows)


def _perplexity_chart(report: Report) -> Markup:
    rows = [
        charts.Bar(
            language_name(row.language),
            ((0.0, row.perplexity_original), (0.0, row.perplexity_bundle)),
            f"{text.number(row.perplexity_original)} → {text.number(row.perplexity_bundle)}",
        )
        for row in _by_divergence(report.fidelity.languages)
    ]
    return charts.bars("perplexity", "Perplexity by language", "perplexity, lower is better", rows)


def _share_chart(report: Report) -> Markup:
    rows, total = [], 0.0
    for index, share in enumerate(report.shares, 1):
        rows.append(
            charts.Bar(
                f"Cause {index}",
                ((total, total + share.kl_mean_nats),),
                text.number(share.kl_mean_nats),
            )
        )
        total += share.kl_mean_nats
    measured = report.fidelity.overall.kl_mean_nats
    rows.append(charts.Bar("Measured", ((0.0, measured),), text.number(measured), "total"))
    return charts.bars("shares", "Where the divergence comes from", "mean KL divergence, nats per token", rows)


def _histogram(report: Report) -> Markup:
    fidelity = report.fidelity
    return charts.histogram(
        "distribution",
        "Positions by divergence",
        "KL divergence, nats",
        fidelity.kl_histogram_edges_nats,
        fidelity.kl_histogram_counts,
        (
            charts.Marker("99th percentile", fidelity.overall.kl_p99_nats),
            charts.Marker("mean", fidelity.overall.kl_mean_nats),
            charts.Marker("median", fidelity.overall.kl_p50_nats),
        ),
    )


def _decode_chart(report: Report) -> Markup:
    performance = report.performance
    if performance is None:
        return Markup("")
    rates = [("Bundle", performance.bundle.decode_tokens_per_s.value)]
    if performance.original is not None:
        rates.insert(0, ("Original", performance.original.decode_tokens_per_s.value))
    rows = [charts.Bar(name, ((0.0, rate),), text.number(rate), name.lower()) for name, rate in rates]
    bound = performance.roofline_decode_tokens_per_s
    roofline = None if bound is None else charts.Marker("bandwidth bound of the bundle", bound)
    return charts.bars("decode", "Generation speed", "tokens per second, one sequence", rows, limit=roofline)
