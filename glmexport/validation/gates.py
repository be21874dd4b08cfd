"""The policy's gates, applied to every language that has enough text to be judged.

A gate passes where even the unfavourable bound keeps the limit: every gate and language has to, so each may be tested
by itself. It blocks where the limit is surely broken, which among many languages some would be by chance: those tests
are corrected for their number (Holm). What is neither is INCONCLUSIVE.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from glmexport.bundle.manifest import LargestActivation, Manifest
from glmexport.bundle.records import ExpertCoverage
from glmexport.foundation.target import Gates
from glmexport.results.behaviour import Behaviour
from glmexport.results.fidelity import CaptureBound, Estimate, Fidelity, LanguageFidelity
from glmexport.results.gate import Gate
from glmexport.results.prompts import PromptParity
from glmexport.results.record import Verdict, badness, worst
from glmexport.results.reference import ReferenceCheck
from glmexport.results.statistics import holm
from glmexport.results.weights import WeightCheck, WeightFault
from glmexport.validation.losses import Loss, losses
from glmexport.validation.statistics import bounds, documents_needed, p_value

#: A captured original may hide so much of the divergence before somebody has to know.
HIDDEN_SHARE = 0.25

#: With about as many tokens as columns GPTQ follows chance, and can end behind rounding to nearest.
EFFECTIVE_TOKENS = 2.0


#: The largest number of float16. Calibration text is a sample: what comes within half of it may be passed by others.
FLOAT16_LARGEST = 65504.0
FLOAT16_ROOM = FLOAT16_LARGEST / 2


@dataclass(frozen=True)
class Judged:
    """One limit in one language; ``estimate`` and ``limit`` of a quantity that has to be small."""

    name: str
    unit: str
    row: LanguageFidelity
    estimate: Estimate
    limit: float
    #: What is reported is 1 less the estimate, and has to be large.
    complement: bool = False


def apply_gates(fidelity: Fidelity, policy: Gates, behaviour: Behaviour | None = None) -> tuple[Gate, ...]:
    """Every gate in each language that does not pass it, or else in the one that comes nearest to the limit.

    A language below ``minimum_positions`` is INCONCLUSIVE, never PASS. The gates of ``behaviour`` are over all of them.
    """
    judged = [row for row in fidelity.languages if row.positions >= policy.minimum_positions]
    results = [
        counted(
            "Enough text to judge",
            row.language,
            row.positions,
            policy.minimum_positions,
            "positions",
            _documents(row.documents),
            at_least=True,
            otherwise=Verdict.INCONCLUSIVE,
        )
        for row in fidelity.languages
        if row.positions < policy.minimum_positions
    ]
    tests = [test for row in judged for test in judged_estimates(row, policy)]
    lost = list(losses(behaviour, policy.behaviour, policy.confidence)) if behaviour else []
    chances = [*(p_value(test.estimate, test.limit) for test in tests), *(loss.p_value for loss in lost)]
    broken = holm(chances, 1 - policy.confidence)
    for name in dict.fromkeys(test.name for test in tests):
        gates = [
            _estimated(test, block, policy, len(chances))
            for test, block in zip(tests, broken, strict=False)
            if test.name == name
        ]
        failed = [gate for gate in gates if gate.verdict is not Verdict.PASS]
        results += sorted(failed, key=lambda gate: -gate.verdict.severity) or [min(gates, key=_room)]
    results += [_lost(loss, block, policy) for loss, block in zip(lost, broken[len(tests) :], strict=True)]
    return tuple(results)


def build_gates(fallbacks: int, effective_tokens: float | None, matrices: int) -> tuple[Gate, ...]:
    """What the build itself has to answer for; nobody may overlook it, so each is a WARN.

    No matrix may have been quantized in a weaker way than the recipe asks for, and no Hessian may rest on so little
    text that it describes chance: ``effective_tokens`` is the fewest a column of any matrix, None if unmeasured.
    """
    sample = f"{matrices} matrices"
    gates = [counted("Matrices that fell back", None, fallbacks, 0, "matrices", sample, otherwise=Verdict.WARN)]
    if effective_tokens is not None:
        gates.append(
            counted(
                "Effective tokens per column",
                None,
                effective_tokens,
                EFFECTIVE_TOKENS,
                "tokens",
                sample,
                at_least=True,
                otherwise=Verdict.WARN,
            )
        )
    return tuple(gates)


def coverage_gate(experts: Sequence[ExpertCoverage]) -> Gate:
    """No routed expert may rest on other experts' text instead of its own; a WARN where one does."""
    sample = f"{sum(len(layer.tokens) for layer in experts)} experts of {len(experts)} layers"
    cold = sum(len(layer.cold) for layer in experts)
    return counted("Cold experts", None, cold, 0, "experts", sample, otherwise=Verdict.WARN)


def range_gate(largest: LargestActivation) -> Gate:
    """No number may come near the end of float16: a WARN beyond half of it, a BLOCK where it becomes infinite."""
    beyond = not largest.magnitude <= FLOAT16_LARGEST
    return counted(
        "Largest activation in float16",
        None,
        largest.magnitude,
        FLOAT16_ROOM,
        "magnitude",
        f"calibration text, read by {largest.at}; float16 ends at {FLOAT16_LARGEST:,.0f}",
        otherwise=Verdict.BLOCK if beyond else Verdict.WARN,
    )


def manifest_gates(manifest: Manifest) -> tuple[Gate, ...]:
    """``range_gate``, ``build_gates`` and ``coverage_gate`` of what the build wrote down, as far as it did anything."""
    ranges = (range_gate(manifest.largest_activation),) if manifest.largest_activation else ()
    if not manifest.matrices:
        return ranges
    fallbacks = sum(matrix.fallback is not None for matrix in manifest.matrices)
    # Those of routed experts have a gate of their own.
    tokens = [matrix.effective_tokens_per_column for matrix in manifest.matrices if matrix.chosen is None]
    fewest = min((count for count in tokens if count is not None), default=None)
    gates = build_gates(fallbacks, fewest, len(manifest.matrices))
    return (*ranges, *gates, *((coverage_gate(manifest.experts),) if manifest.experts else ()))


def prompt_gate(parity: PromptParity) -> Gate:
    """Not a single conversation may become other tokens; a WARN where that cannot be told."""
    if not parity.compared:
        why = parity.unopened or f"both templates refuse all {parity.refused} conversations"
        return counted("Prompts compared", None, 0, 1, "prompts", why, at_least=True, otherwise=Verdict.WARN)
    sample = f"{parity.compared} conversations"
    return counted(
        "Prompts with other tokens", None, len(parity.differences), 0, "prompts", sample, otherwise=Verdict.BLOCK
    )


def weight_gates(check: WeightCheck) -> tuple[Gate, ...]:
    """No number of the graph may be another than was decided on; a row that has lost the original's is a WARN, since
    where inputs hang together the weights of one row can make up for each other.
    """
    other = [fault for fault in check.faults if fault.kind == "other"]
    far = [fault for fault in check.faults if fault.kind == "far"]

    def sample(faults: Sequence[WeightFault]) -> str:
        named = f"; first {faults[0].tensor}: {faults[0].detail}" if faults else ""
        return f"{check.matrices} matrices and {check.tensors} other tensors{named}"

    return (
        counted("Tensors that were changed", None, len(other), 0, "tensors", sample(other), otherwise=Verdict.BLOCK),
        counted("Matrices with lost rows", None, len(far), 0, "matrices", sample(far), otherwise=Verdict.WARN),
    )


def reference_gate(check: ReferenceCheck | None) -> tuple[Gate, ...]:
    """The original that everything is compared with has to be the model that transformers loads; nothing if unknown."""
    if check is None or check.max_difference is None or check.limit is None:
        return ()
    sample = f"{check.positions} positions; transformers' whole model in fp32"
    return (
        counted(
            "Original against transformers",
            None,
            check.max_difference,
            check.limit,
            "logits",
            sample,
            otherwise=Verdict.BLOCK,
        ),
    )


def capture_gate(bound: CaptureBound) -> Gate:
    """What is passed on lower bounds has to be near the bound: a WARN where much of the divergence is not seen."""
    # No divergence hides nothing.
    seen = bound.kl_mean_partition_nats / bound.kl_mean_nats if bound.kl_mean_nats else 1.0
    return counted(
        "Divergence hidden by the capture",
        None,
        max(0.0, 1 - seen),
        HIDDEN_SHARE,
        "share",
        f"{bound.audit_positions} positions",
        otherwise=Verdict.WARN,
    )


def verdict_of(gates: Iterable[Gate]) -> Verdict:
    """The gravest verdict of all gates."""
    return worst(gate.verdict for gate in gates)


def judged_estimates(row: LanguageFidelity, policy: Gates) -> tuple[Judged, ...]:
    """Every estimate of one language that has a limit."""
    limits = policy.limits(row.language)
    assert limits.kl_mean_nats and limits.ln_perplexity_ratio and limits.top1_agreement
    return (
        Judged("Mean KL divergence", "nats/token", row, row.kl, limits.kl_mean_nats),
        Judged("ln perplexity ratio", "nats/token", row, row.ln_perplexity_ratio, limits.ln_perplexity_ratio),
        Judged("Top-1 agreement", "share", row, row.top1_disagreement, 1 - limits.top1_agreement, complement=True),
    )


def _estimated(test: Judged, broken: bool, policy: Gates, tests: int) -> Gate:
    value = test.estimate.value
    lower, upper = bounds(test.estimate, policy.confidence)
    if broken:
        verdict = Verdict.BLOCK
    elif not upper <= test.limit:
        verdict = Verdict.INCONCLUSIVE
    else:
        verdict = Verdict.WARN if lower > policy.warn_at * test.limit else Verdict.PASS
    limit, needed = test.limit, None
    if verdict is Verdict.INCONCLUSIVE:
        needed = documents_needed(test.estimate, test.limit, policy.confidence, tests)
        # As many as there are did not decide, whatever is to be expected of them.
        needed = needed and max(needed, test.estimate.documents + 1)
    if test.complement:
        value, limit, lower, upper = 1 - value, 1 - limit, 1 - upper, 1 - lower
    return Gate(
        name=test.name,
        language=test.row.language,
        value=value,
        limit=limit,
        unit=test.unit,
        direction="at least" if test.complement else "at most",
        sample=f"{test.row.positions} positions of {_documents(test.row.documents)}",
        verdict=verdict,
        lower=lower,
        upper=upper,
        confidence=policy.confidence,
        documents_needed=needed,
    )


def _lost(loss: Loss, broken: bool, policy: Gates) -> Gate:
    if broken:
        verdict = Verdict.BLOCK
    elif not loss.upper <= loss.limit:
        verdict = Verdict.INCONCLUSIVE
    else:
        verdict = Verdict.WARN if loss.lower > policy.warn_at * loss.limit else Verdict.PASS
    return Gate(
        name=loss.name,
        language=None,
        value=loss.value,
        limit=loss.limit,
        unit=loss.unit,
        direction="at most",
        sample=loss.sample,
        verdict=verdict,
        lower=loss.lower,
        upper=loss.upper,
        confidence=policy.confidence,
        documents_needed=loss.needed if verdict is Verdict.INCONCLUSIVE else None,
        needed_unit=loss.noun,
    )


def _room(gate: Gate) -> float:
    """What the unfavourable bound leaves of the limit; smallest where it is nearest to breaking."""
    assert gate.lower is not None and gate.upper is not None
    if gate.direction == "at least":
        return -badness((1 - gate.lower) / (1 - gate.limit))
    return -badness(gate.upper / gate.limit)


def _documents(count: int) -> str:
    return "1 document" if count == 1 else f"{count} documents"


def counted(
    name: str,
    language: str | None,
    value: float,
    limit: float,
    unit: str,
    sample: str,
    *,
    at_least: bool = False,
    otherwise: Verdict,
) -> Gate:
    """A gate of what is counted: PASS on the right side of the limit, else ``otherwise``; NaN is on no side."""
    held = value >= limit if at_least else value <= limit
    return Gate(
        name=name,
        language=language,
        value=value,
        limit=limit,
        unit=unit,
        direction="at least" if at_least else "at most",
        sample=sample,
        verdict=Verdict.PASS if held and math.isfinite(value) else otherwise,
    )
