"""A table of several devices with a column for each class of them; the worst device of a class is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmexport.foundation.languages import language_name
from glmexport.report import text
from glmexport.report.speed import NOT_MEASURED
from glmexport.results.device import DeviceFacts, DeviceResult
from glmexport.results.fidelity import Fidelity
from glmexport.results.performance import Performance
from glmexport.results.record import Verdict, badness, worst

if TYPE_CHECKING:
    from glmexport.report.document import Report

FAILED = "no answer"
EMULATED = "correctness only"


@dataclass(frozen=True)
class DeviceTable:
    """One row a quantity, one cell a class; ``notes`` say what did not run, and why."""

    classes: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    notes: tuple[str, ...]


def device_table(report: Report) -> DeviceTable | None:
    """Return the table of all devices; None where the report is of this machine alone."""
    if not report.devices:
        return None
    groups: dict[str, list[DeviceResult]] = {}
    for device in report.devices:
        groups.setdefault(device.device_class, []).append(device)
    rows = tuple((name, tuple(of(group) for group in groups.values())) for name, of in _rows(report))
    return DeviceTable(
        classes=tuple(groups),
        verdicts=tuple(worst(device.verdict for device in group) for group in groups.values()),
        rows=rows,
        notes=tuple(_notes(report)),
    )


def _notes(report: Report) -> Iterator[str]:
    for device in report.devices:
        if device.failure:
            yield f"{device.name} did not answer: {device.failure}"
        elif device.facts and device.facts.emulated:
            yield f"{device.name}, {EMULATED}: {device.facts.emulated}"
        elif device.performance_absent_because:
            yield f"{device.name}: speed was not measured: {device.performance_absent_because}"


_Cell = Callable[[list[DeviceResult]], str]


def _rows(report: Report) -> Iterator[tuple[str, _Cell]]:
    yield "Devices", lambda group: ", ".join(device.name for device in group)
    yield "Processor", lambda group: _same(group, lambda facts: facts.processor)
    yield "Runtime", lambda group: _same(group, lambda facts: facts.runtime)
    yield "Provider", lambda group: _same(group, _provider)
    yield "Same next token", _least(lambda fidelity: fidelity.overall.top1_agreement, text.percent)
    yield "Mean divergence, nats", _most(lambda fidelity: fidelity.overall.kl_mean_nats)
    for language in report.subject.languages:
        yield f"Mean divergence, {language_name(language)}", _most(_of_language(language))
    yield "Time to first token", _speed(lambda speed: speed.bundle.ttft_s.value, "s", slowest=max)
    yield "Prefill", _speed(lambda speed: speed.bundle.prefill_tokens_per_s.value, "tokens/s", slowest=min)
    yield "Decode", _speed(lambda speed: speed.bundle.decode_tokens_per_s.value, "tokens/s", slowest=min)
    yield "Peak memory", _speed(lambda speed: speed.bundle.peak_memory_bytes, "bytes", slowest=max)


def _provider(facts: DeviceFacts) -> str:
    return f"{facts.provider} ({facts.adapter})" if facts.adapter else facts.provider


def _same(group: list[DeviceResult], of: Callable[[DeviceFacts], str]) -> str:
    """Return the text that all devices of a class have in common, or that of each."""
    return ", ".join(dict.fromkeys(of(device.facts) if device.facts else FAILED for device in group))


def _measured(group: list[DeviceResult], of: Callable[[Fidelity], float | None]) -> list[float]:
    found = [of(device.fidelity) for device in group if device.fidelity]
    return [value for value in found if value is not None]


def _most(of: Callable[[Fidelity], float | None]) -> _Cell:
    return lambda group: text.number(max(values, key=badness)) if (values := _measured(group, of)) else FAILED


def _least(of: Callable[[Fidelity], float | None], form: Callable[[float], str]) -> _Cell:
    return lambda group: form(min(values)) if (values := _measured(group, of)) else FAILED


def _of_language(language: str) -> Callable[[Fidelity], float | None]:
    def mean(fidelity: Fidelity) -> float | None:
        return next((row.kl_mean_nats for row in fidelity.languages if row.language == language), None)

    return mean


def _speed(of: Callable[[Performance], float | None], unit: str, *, slowest: Callable[[list[float]], float]) -> _Cell:
    def cell(group: list[DeviceResult]) -> str:
        found = [of(device.performance) for device in group if device.performance]
        values = [value for value in found if value is not None]
        if values:
            return text.quantity(slowest(values), unit)
        if all(device.failure for device in group):
            return FAILED
        return EMULATED if any(device.facts and device.facts.emulated for device in group) else NOT_MEASURED

    return cell
