"""Facts in which two reports differ beside the bundle: original, recipe, text, policy, machine, versions."""

from __future__ import annotations

from collections.abc import Iterator

from glmexport.report.comparison import DifferingFact
from glmexport.report.document import Report

_NONE = "none"


def differing(old: Report, new: Report) -> tuple[DifferingFact, ...]:
    """Yield every fact that is not the same, in the order in which a reader asks for it."""
    before, after = dict(_facts(old)), dict(_facts(new))
    names = dict.fromkeys((*before, *after))
    return tuple(
        DifferingFact(name=name, old=before.get(name, _NONE), new=after.get(name, _NONE))
        for name in names
        if before.get(name) != after.get(name)
    )


def same_text(old: Report, new: Report) -> bool:
    """Return whether the same documents could be asked about, as the same token ids."""
    return old.fidelity.text_digest == new.fidelity.text_digest


def ended_apart(old: Report, new: Report) -> tuple[str, ...]:
    """Return the languages of which one report judged less of the same text than the other did."""
    before = {row.language: row.documents for row in old.fidelity.languages}
    after = {row.language: row.documents for row in new.fidelity.languages}
    return tuple(sorted(tag for tag in before.keys() & after.keys() if before[tag] != after[tag]))


def same_run(old: Report, new: Report) -> bool:
    """Return whether speeds are of the same work."""
    return _work(old) == _work(new)


def same_conditions(old: Report, new: Report) -> bool:
    """Return whether speeds are of the same kind of machine, as far as reports tell."""
    return _place(old) == _place(new)


def _work(report: Report) -> tuple[int, int] | None:
    if report.performance is None:
        return None
    return report.performance.prompt_tokens, report.performance.generated_tokens


def _place(report: Report) -> tuple[str, int | None, int | None]:
    threads = report.performance.bundle.threads if report.performance else None
    return report.machine.processor, report.machine.cores, threads


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    subject, fidelity, machine = report.subject, report.fidelity, report.machine
    yield "original", subject.checkpoint
    yield "original digest", subject.checkpoint_digest
    yield "family", subject.family
    yield "adapter", subject.adapter or _NONE
    yield "adapter digest", subject.adapter_digest or _NONE
    yield "recipe", subject.recipe
    yield "target", subject.target
    yield "arithmetic", fidelity.arithmetic
    yield "calibration digest", report.calibration.digest if report.calibration else _NONE
    documents = sum(row.documents for row in fidelity.languages)
    positions = sum(row.positions for row in fidelity.languages)
    yield (
        "evaluation text",
        f"{positions} positions, {documents} documents, {len(fidelity.languages)} languages ({fidelity.text_digest})",
    )
    yield "original's answers", f"captured, top {fidelity.capture.top_k}" if fidelity.capture else "all"
    yield "original's arithmetic", report.arithmetic.library if report.arithmetic else _NONE
    yield "policy", report.policy.source
    yield "limits", report.policy.gates.model_dump_json(exclude_defaults=True)
    yield "machine", f"{machine.processor}, {machine.cores} cores, {machine.memory_bytes} bytes"
    yield "system", machine.system
    yield "instruction sets", ", ".join(machine.instruction_sets)
    if report.performance:
        yield "threads", str(report.performance.bundle.threads)
        yield "speed measured with", "{} prompt and {} generated tokens".format(*(_work(report) or ()))
        yield "runtime", report.performance.bundle.runtime
    if report.detailed:
        yield "device", report.detailed
    yield "glmexport", report.glmexport_version
    for name, version in report.versions.items():
        if name != "glmexport":
            yield name, version
