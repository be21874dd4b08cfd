"""Comparison of two reports: what changed by more than chance, and whether that is for the worse.

As benchstat does (golang.org/x/perf), a change is called one only if a test finds it. Reports hold means with standard
errors and no document's own figures, so the estimates are taken as independent even where the text is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from glmexport.foundation.errors import InputError
from glmexport.foundation.target import Limits
from glmexport.report.comparison import Change, ComparedReport, Comparison, GateChange, Outcome
from glmexport.report.differing import differing, ended_apart, same_conditions, same_run, same_text
from glmexport.report.document import Report
from glmexport.results.fidelity import Estimate, LanguageFidelity
from glmexport.results.performance import Interval, Speed
from glmexport.results.record import Verdict, badness, worst
from glmexport.results.statistics import Difference, difference, holm, log_ratio

CONFIDENCE = 0.95


@dataclass(frozen=True)
class _Metric:
    """A figure of fidelity, as a quantity that has to be small."""

    name: str
    unit: str
    estimate: Callable[[LanguageFidelity], Estimate]
    limit: Callable[[Limits], float | None]
    #: Whether the report shows 1 less the estimate.
    complement: bool = False


_DIVERGENCE = _Metric("Mean KL divergence", "nats/token", lambda row: row.kl, lambda limits: limits.kl_mean_nats)
_METRICS = (
    _DIVERGENCE,
    _Metric(
        "ln perplexity ratio",
        "nats/token",
        lambda row: row.ln_perplexity_ratio,
        lambda limits: limits.ln_perplexity_ratio,
    ),
    _Metric(
        "Top-1 agreement",
        "share",
        lambda row: row.top1_disagreement,
        lambda limits: None if limits.top1_agreement is None else 1 - limits.top1_agreement,
        complement=True,
    ),
)
_SPEEDS = (
    ("Loading", "load_s", "s", False),
    ("Time to first token", "ttft_s", "s", False),
    ("Prefill", "prefill_tokens_per_s", "tokens/s", True),
    ("Decode", "decode_tokens_per_s", "tokens/s", True),
    ("Peak memory", "peak_memory_bytes", "bytes", False),
)
_SIZES = (
    ("Size", "bundle_bytes", "bytes"),
    ("Bits per weight", "bits_per_weight", "bits"),
    ("Bits per weight of the linears", "bits_per_weight_linears", "bits"),
)


def compare(old: Report, new: Report, *, confidence: float = CONFIDENCE) -> Comparison:
    """Compare the report ``new`` with ``old``.

    It is "worse" if a figure of fidelity or speed is significantly so, or a verdict got worse and says that it is; else
    "undecided" if the text does not suffice to exclude a worsening as large as the limit of the new report's policy.

    Args:
        old: what is compared with.
        new: what may have become worse.
        confidence: of the intervals, 0.5 to 1; 1 less it is the risk of the tests together.

    Raises:
        InputError: no language is in both.
    """
    shared = [row.language for row in new.fidelity.languages if _row(old, row.language)]
    if not shared:
        raise InputError(
            "The reports have no language in common.", next_step="Validate both bundles on the same evaluation text."
        )
    changes = [*_fidelity(old, new, shared, confidence), *_speed(old, new, confidence), *_size(old, new)]
    tested = [index for index, change in enumerate(changes) if change.p_value is not None]
    found = holm([changes[index].p_value or 0.0 for index in tested], 1 - confidence)
    for index, significant in zip(tested, found, strict=True):
        undecided = changes[index].undecided and not significant
        changes[index] = changes[index].model_copy(update={"significant": significant, "undecided": undecided})
    gates = tuple(_gates(old, new))
    outcome, reasons = _outcome(old, new, changes, gates)
    return Comparison(
        outcome=outcome,
        reasons=reasons,
        old=_side(old),
        new=_side(new),
        differing=differing(old, new),
        changes=tuple(changes),
        gates=gates,
        tests=len(tested),
        confidence=confidence,
        remarks=tuple(_remarks(old, new)),
    )


def _side(report: Report) -> ComparedReport:
    return ComparedReport(
        bundle=report.subject.bundle, bundle_digest=report.subject.bundle_digest, verdict=report.verdict
    )


def _row(report: Report, language: str) -> LanguageFidelity | None:
    return next((row for row in report.fidelity.languages if row.language == language), None)


def _fidelity(old: Report, new: Report, shared: Sequence[str], confidence: float) -> Iterator[Change]:
    pairs = [(_row(old, language), _row(new, language)) for language in shared]
    # All languages together are another mean if they are not the same languages.
    if {row.language for row in old.fidelity.languages} == {row.language for row in new.fidelity.languages}:
        pairs.append((old.fidelity.overall, new.fidelity.overall))
    for metric in _METRICS:
        if metric is _DIVERGENCE and _hidden(old) != _hidden(new):
            continue
        floors = [report.fidelity.noise_floor for report in (old, new)]
        floor = max((abs(metric.estimate(row).value) for row in floors if row), default=0.0)
        for before, after in pairs:
            assert before and after
            yield _estimated(metric, before, after, new, floor, confidence)


def _estimated(
    metric: _Metric, before: LanguageFidelity, after: LanguageFidelity, report: Report, floor: float, confidence: float
) -> Change:
    first, second = metric.estimate(before), metric.estimate(after)
    found = difference(first, second, confidence)
    gates = report.policy.gates
    limit = metric.limit(gates.limits(after.language))
    # What is no more than the original differs from itself is no difference.
    noise = abs(found.value) <= floor
    little = min(before.positions, after.positions) < gates.minimum_positions
    values = (first.value, second.value, found.value, found.lower, found.upper)
    if metric.complement:
        values = (1 - first.value, 1 - second.value, -found.value, -found.upper, -found.lower)
    return Change(
        kind="fidelity",
        name=metric.name,
        language=after.language,
        unit=metric.unit,
        old=values[0],
        new=values[1],
        scale="difference",
        change=values[2],
        lower=values[3],
        upper=values[4],
        p_value=1.0 if noise else found.p_value,
        significant=False,
        worse=badness(second.value) > badness(first.value),
        undecided=not noise and (little or (limit is not None and not found.upper <= limit)),
        decides=True,
    )


def _hidden(report: Report) -> int | None:
    """Tokens of the original whose probabilities are known one by one; None for all. Another number, another KL."""
    return report.fidelity.capture.top_k if report.fidelity.capture else None


@dataclass(frozen=True)
class _Measured:
    """A figure of speed; bounds where there are any, each passed in one case of 1 / (1 - confidence)."""

    value: float
    bounds: tuple[float, float] | None = None
    confidence: float = CONFIDENCE


def _measured(speed: Speed, field: str) -> _Measured:
    """The one place that knows how a report holds a figure of speed."""
    figure = getattr(speed, field)
    if figure is None:
        return _Measured(math.nan)
    if not isinstance(figure, Interval):
        return _Measured(float(figure))
    known = 0 < figure.lower <= figure.upper < math.inf
    return _Measured(figure.value, (figure.lower, figure.upper) if known else None, figure.confidence)


def _speed(old: Report, new: Report, confidence: float) -> Iterator[Change]:
    if old.performance is None or new.performance is None or not same_run(old, new):
        return
    for name, field, unit, more_is_better in _SPEEDS:
        first, second = (_measured(speed.bundle, field) for speed in (old.performance, new.performance))
        positive = all(math.isfinite(each.value) and each.value > 0 for each in (first, second))
        ratio = second.value / first.value if positive else math.nan
        found: Difference | None = None
        if positive and first.bounds and second.bounds and first.confidence == second.confidence:
            found = log_ratio(
                (first.value, *first.bounds), (second.value, *second.bounds), first.confidence, confidence
            )
        yield Change(
            kind="speed",
            name=name,
            language=None,
            unit=unit,
            old=first.value,
            new=second.value,
            scale="ratio",
            change=ratio,
            lower=_exponential(found.lower) if found else None,
            upper=_exponential(found.upper) if found else None,
            p_value=found.p_value if found else None,
            significant=False,
            worse=second.value < first.value if more_is_better else second.value > first.value,
            decides=same_conditions(old, new),
        )


def _exponential(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _size(old: Report, new: Report) -> Iterator[Change]:
    """Counted, so nothing is tested; and no size is wrong by itself, so none decides."""
    for name, field, unit in _SIZES:
        first, second = (float(getattr(report.size, field)) for report in (old, new))
        yield Change(
            kind="size",
            name=name,
            language=None,
            unit=unit,
            old=first,
            new=second,
            scale="ratio",
            change=second / first if first else math.nan,
            lower=None,
            upper=None,
            p_value=None,
            significant=False,
            worse=second > first,
            decides=False,
        )


def _gates(old: Report, new: Report) -> Iterator[GateChange]:
    """Return gates by name: a report lists one in languages that do not pass, or in the nearest, which can differ."""
    for name in dict.fromkeys(gate.name for report in (old, new) for gate in report.gates):
        before, after = (_gravest(report, name) for report in (old, new))
        if before is after or {before, after} == {None, Verdict.PASS}:
            continue
        languages = (gate.language for gate in new.gates if gate.name == name and gate.verdict is after)
        yield GateChange(name=name, old=before, new=after, languages=tuple(tag for tag in languages if tag))


def _gravest(report: Report, name: str) -> Verdict | None:
    verdicts = [gate.verdict for gate in report.gates if gate.name == name]
    return worst(verdicts) if verdicts else None


def _outcome(
    old: Report, new: Report, changes: Iterable[Change], gates: Iterable[GateChange]
) -> tuple[Outcome, tuple[str, ...]]:
    worsened = [change for change in changes if change.significant and change.worse and change.decides]
    verdicts = [("The verdict", old.verdict, new.verdict)]
    # A gate that is in one report only says nothing by itself: the verdict carries it.
    verdicts += [(f"Gate {gate.name!r}", gate.old, gate.new) for gate in gates if gate.old and gate.new]
    fallen = [(name, was, now) for name, was, now in verdicts if now.severity > was.severity]
    reasons = [f"{name} is significantly worse: {_named(rows)}." for name, rows in _by_name(worsened)]
    reasons += [f"{name} went from {was} to {now}." for name, was, now in fallen if now is not Verdict.INCONCLUSIVE]
    if reasons:
        return "worse", tuple(reasons)
    open_ = [change for change in changes if change.undecided]
    reasons = [
        f"{name} may be worse by as much as the policy allows in all: {_named(rows)}." for name, rows in _by_name(open_)
    ]
    reasons += [f"{name} went from {was} to {now}." for name, was, now in fallen]
    return ("undecided", tuple(reasons)) if reasons else ("no worse", ())


def _by_name(changes: Iterable[Change]) -> Iterator[tuple[str, list[Change]]]:
    rows = list(changes)
    for name in dict.fromkeys(change.name for change in rows):
        yield name, [change for change in rows if change.name == name]


def _named(changes: Sequence[Change]) -> str:
    languages = [change.language for change in changes if change.language]
    return ", ".join(languages) if languages else "the bundle"


def _remarks(old: Report, new: Report) -> Iterator[str]:
    if old.subject.checkpoint_digest != new.subject.checkpoint_digest:
        family = "even of different families, " if old.subject.family != new.subject.family else ""
        yield (
            f"The originals are not the same, {family}and each bundle was measured against its own: what changed is "
            "how much was lost, not which answers are better."
        )
    apart = ended_apart(old, new)
    if same_text(old, new) and not apart:
        yield (
            "Both rest on the same text. Reports do not hold the figures of single documents, so nothing could be "
            "paired: intervals are wider than need be."
        )
    elif same_text(old, new):
        yield (
            f"The evaluation text is the same, of which one report judged less than the other, as gates were decided "
            f"earlier: {', '.join(apart)}. Reports do not hold the figures of single documents, so each mean is "
            "compared as it is, not over the documents that both have; --full-text of validate judges all."
        )
    else:
        yield "The evaluation text is not the same: a part of every change may be that of the text."
    if _hidden(old) != _hidden(new):
        yield (
            "Divergences are not compared: an original that was captured gives lower bounds of them, which depend on "
            "how many tokens were captured."
        )
    tags = [{row.language for row in report.fidelity.languages} for report in (old, new)]
    if tags[0] != tags[1]:
        yield f"In one report only, and so not compared: {', '.join(sorted(tags[0] ^ tags[1]))}, and the mean of all."
    if old.policy.gates != new.policy.gates:
        yield "The limits are not the same: verdicts may differ for that alone."
    if not same_run(old, new):
        yield "Speeds are not compared: the prompt or the answer had another length."
    elif not same_conditions(old, new):
        yield "Speeds are those of different machines or numbers of threads, so none of them decides."
