"""What was measured, as the evidence of a tuned target."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from glmexport.foundation import machine
from glmexport.foundation.evidence import CandidateSettings, Evidence, Gains, Preference, TriedCandidate
from glmexport.foundation.provenance import Provenance
from glmexport.foundation.recipe import STORED
from glmexport.foundation.target import Target
from glmexport.tuning.candidates import identity, label, numerics, with_settings
from glmexport.tuning.pareto import Timed
from glmexport.tuning.plan import Measured, TuningPlan
from glmexport.tuning.search import Fate
from glmexport.validation.texts import text_digest

_PREFERRED = {"decode": "decoding", "prefill": "prefill", "balanced": "decoding and prefill together"}


@dataclass(frozen=True)
class TunedModel:
    """The checkpoint that a target was tuned with."""

    name: str
    digest: str


def evidence_of(
    plan: TuningPlan,
    model: TunedModel,
    measured: Measured,
    fates: Mapping[str, Fate],
    chosen: Timed | None,
    confirmed: Gains | None,
) -> Evidence:
    """Return everything that was found out, for the target's file.

    Args:
        plan: what was compared.
        model: what with.
        measured: the divergences.
        fates: what became of every candidate that was timed, by identity.
        chosen: what is taken; None: the start stays.
        confirmed: its speed in rounds that took no part in choosing.
    """
    return Evidence(
        verdict=verdict_of(chosen, confirmed, measured.illegal.get(numerics(plan.start), ""), plan.options.prefer),
        confirmed=confirmed,
        start=plan.target.name,
        checkpoint=model.name,
        checkpoint_digest=model.digest,
        prefer=plan.options.prefer,
        allowance_nats=plan.allowance_nats,
        weights="gptq" if plan.options.calibrated else "round-to-nearest",
        text_digest=text_digest(plan.texts),
        timed=plan.slices.description,
        prompt_tokens=(plan.workload.short, len(plan.workload.prompt)),
        generated_tokens=plan.workload.generated,
        processor=machine.processor_name(),
        cores=plan.options.cores,
        system=machine.system_name(),
        libraries=machine.library_versions(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        candidates=tuple(tried(each, plan.start, measured, fates) for each in plan.candidates),
    )


def tried(
    settings: CandidateSettings, start: CandidateSettings, measured: Measured, fates: Mapping[str, Fate]
) -> TriedCandidate:
    """Return what one candidate is, what was measured of it, and what became of it."""
    kind = numerics(settings)
    reason = measured.illegal.get(kind, "")
    if settings == start:
        fate = Fate("start", reason or "what the others are compared with")
    else:
        fate = fates.get(identity(settings)) or Fate("illegal", reason)
    return TriedCandidate(
        settings=settings,
        outcome=fate.outcome,
        reason=fate.reason,
        gains=fate.gains,
        divergence=measured.divergences[kind],
    )


def verdict_of(chosen: Timed | None, confirmed: Gains | None, illegal_start: str, prefer: Preference) -> str:
    """Return one or two sentences for people; ``illegal_start`` says why the start may not be taken, if it may not."""
    what = _PREFERRED[prefer]
    if chosen is None or confirmed is None:
        return f"Nothing legal was surely faster than the start in {what}; the start stays as it is."
    gain = confirmed.preferred
    speed = f"{gain.ratio:.2f} times the start's speed in {what}"
    if gain.lower is not None and gain.upper is not None:
        speed += f" ({gain.lower:.2f} to {gain.upper:.2f})"
    settings = label(chosen.settings)
    if illegal_start:
        return f"The start is not legal: {illegal_start}. The best that is: {settings}, {speed}."
    return f"{settings}: {speed}."


def tuned_target(target: Target, chosen: CandidateSettings | None, evidence: Evidence, name: str) -> Target:
    """Return ``target`` with what was chosen, called ``name``; unchanged but for its evidence where the start stays."""
    tuned = with_settings(target, chosen) if chosen else target
    if tuned.weights.default_recipe == STORED:
        # The checkpoint's making; the target's own is for others.
        weights = tuned.weights.model_copy(update={"default_recipe": target.weights.default_recipe})
        tuned = tuned.model_copy(update={"weights": weights})
    runtime = evidence.libraries.get("onnxruntime", "of another build")
    provenance = Provenance(
        measured_on=f"{evidence.processor}, {evidence.cores} cores, ONNX Runtime {runtime}",
        date=evidence.date,
        notes=f"glmexport tune of {evidence.checkpoint}: {evidence.verdict} Before: {target.provenance.notes}",
    )
    return tuned.model_copy(update={"name": name, "provenance": provenance, "evidence": evidence})
