"""What was measured, as the evidence of a tuned target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from glmexport.foundation.evidence import CandidateSettings, Divergences, Evidence, Gains, Preference, TriedCandidate
from glmexport.foundation.recipe import STORED
from glmexport.foundation.target import Provenance, Target
from glmexport.tuning.candidates import Numerics, identity, label, numerics, with_settings
from glmexport.tuning.pareto import Timed
from glmexport.tuning.search import Fate

_PREFERRED = {"decode": "decoding", "prefill": "prefill", "balanced": "decoding and prefill together"}


@dataclass(frozen=True)
class Measured:
    """Divergences by numerics, and why some are not legal."""

    divergences: Mapping[Numerics, Divergences]
    illegal: Mapping[Numerics, str]

    def is_legal(self, settings: CandidateSettings) -> bool:
        """Whether a candidate may be taken."""
        return numerics(settings) not in self.illegal


def tried(
    settings: CandidateSettings, start: CandidateSettings, measured: Measured, fates: Mapping[str, Fate]
) -> TriedCandidate:
    """One candidate: what it is, what was measured of it, and what became of it."""
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
    """One or two sentences for people; ``illegal_start`` says why the start may not be taken, if it may not."""
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
    """``target`` with what was chosen, called ``name``; unchanged but for its evidence where the start stays."""
    tuned = with_settings(target, chosen) if chosen else target
    if tuned.weights.default_recipe == STORED:
        # Of the checkpoint's making; the target's own is for others.
        weights = tuned.weights.model_copy(update={"default_recipe": target.weights.default_recipe})
        tuned = tuned.model_copy(update={"weights": weights})
    runtime = evidence.libraries.get("onnxruntime", "of another build")
    provenance = Provenance(
        measured_on=f"{evidence.processor}, {evidence.cores} cores, ONNX Runtime {runtime}",
        date=evidence.date,
        notes=f"glmexport tune of {evidence.checkpoint}: {evidence.verdict} Before: {target.provenance.notes}",
    )
    return tuned.model_copy(update={"name": name, "provenance": provenance, "evidence": evidence})
