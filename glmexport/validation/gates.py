"""The policy's gates, applied to every language that has enough text to be judged.

A gate passes where even the unfavourable bound keeps the limit: every gate and language has to, so each may be tested
by itself. It blocks where the limit is surely broken, which among many languages some would be by chance: those tests
are corrected for their number (Holm). What is neither is INCONCLUSIVE.

Where text is judged in looks, the three estimates of a language (divergence, perplexity, most likely tokens) are tested
at each look, at a level that keeps the risk of all looks together, and are reported of the last look that was taken.
Everything else is judged once: answers, speed, prompts and weights have samples of their own.
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
from glmexport.results.looks import LanguageLooks
from glmexport.results.prompts import PromptParity
from glmexport.results.record import Verdict, badness, worst
from glmexport.results.reference import ReferenceCheck
from glmexport.results.statistics import holm
from glmexport.results.weights import WeightCheck, WeightFault
from glmexport.validation.losses import MOST_LOSSES, Loss, losses
from glmexport.validation.sequential import ALL_TEXT, Stage
from glmexport.validation.statistics import bounds, documents_needed, p_value

#: Largest share of the divergence that a captured original may hide without a warning.
HIDDEN_SHARE = 0.25

#: Fewest effective tokens a column without a warning. With about as many tokens as columns GPTQ follows chance, and
#: can become worse than rounding to nearest.
EFFECTIVE_TOKENS = 2.0

#: Number of estimates of a language that have limits.
_ESTIMATES = 3

#: The largest number of float16. Calibration text is a sample: what comes within half of it may be passed by others.
FLOAT16_LARGEST = 65504.0
FLOAT16_ROOM = FLOAT16_LARGEST / 2


@dataclass(frozen=True)
class JudgedLimit:
    """One limit in one language; ``estimate`` and ``limit`` are of a quantity that has to be small."""

    name: str
    unit: str
    row: LanguageFidelity
    estimate: Estimate
    limit: float
    #: Whether 1 less the estimate is reported, which has to be large.
    complement: bool = False
    #: The look at the language's text that the estimate is of.
    stage: Stage = ALL_TEXT

    @property
    def p_value(self) -> float:
        """The chance of an estimate this large or larger, at whichever look the text ended, at the limit itself."""
        return self.stage.p_value(p_value(self.estimate, self.limit))

    def is_broken(self, risk: float) -> bool:
        """Return whether the limit is surely broken, wrongly so at any look with the chance ``risk``."""
        return self.stage.is_significant(p_value(self.estimate, self.limit), risk)

    def bounds(self, confidence: float) -> tuple[float, float]:
        """Return lower and upper bound, each of which holds at all looks together with ``confidence``."""
        return bounds(self.estimate, self.stage.confidence(confidence))


def apply_gates(fidelity: Fidelity, policy: Gates, behaviour: Behaviour | None = None) -> tuple[Gate, ...]:
    """Return every gate for each language that does not pass it, or else for the one that is nearest to the limit.

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
    stages = {looks.language: stage_of(looks) for looks in fidelity.looks}
    tests = [test for row in judged for test in judged_estimates(row, policy, stages.get(row.language, ALL_TEXT))]
    lost = list(losses(behaviour, policy.behaviour, policy.confidence)) if behaviour else []
    chances = [*(test.p_value for test in tests), *(loss.p_value for loss in lost)]
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


def stage_of(looks: LanguageLooks) -> Stage:
    """Return the last look that was taken."""
    fractions = tuple(look.documents / looks.whole.documents for look in looks.planned)
    return Stage(fractions, looks.taken - 1)


def most_tests(languages: int, task_groups: int) -> int:
    """Return the most tests that Holm's correction can be over, before any answer was asked for."""
    return _ESTIMATES * languages + MOST_LOSSES + task_groups


def is_decided(row: LanguageFidelity, stage: Stage, policy: Gates, tests: int) -> bool:
    """Return whether every estimate of one language surely keeps its limit, or surely breaks it, at this look.

    Surely broken is what the strictest of ``tests`` of Holm's finds, so that no other test has to be known.
    """
    return all(
        test.bounds(policy.confidence)[1] <= test.limit or test.is_broken((1 - policy.confidence) / tests)
        for test in judged_estimates(row, policy, stage)
    )


def build_gates(fallbacks: int, effective_tokens: float | None, matrices: int) -> tuple[Gate, ...]:
    """Return the gates of the build itself; nobody may overlook one that fails, so each is a WARN.

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
    """Return the gate that warns where a routed expert rests on other experts' text instead of its own."""
    sample = f"{sum(len(layer.tokens) for layer in experts)} experts of {len(experts)} layers"
    cold = sum(len(layer.cold) for layer in experts)
    return counted("Cold experts", None, cold, 0, "experts", sample, otherwise=Verdict.WARN)


def range_gate(largest: LargestActivation) -> Gate:
    """Return the gate on the largest number: a WARN beyond half of float16's range, a BLOCK where it is infinite."""
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
    """Return ``range_gate``, ``build_gates`` and ``coverage_gate`` of what the build recorded in the manifest."""
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
    """Return the gate that blocks where a conversation becomes other tokens; a WARN where that cannot be told."""
    if not parity.compared:
        why = parity.unopened or f"both templates refuse all {parity.refused} conversations"
        return counted("Prompts compared", None, 0, 1, "prompts", why, at_least=True, otherwise=Verdict.WARN)
    sample = f"{parity.compared} conversations"
    return counted(
        "Prompts with other tokens", None, len(parity.differences), 0, "prompts", sample, otherwise=Verdict.BLOCK
    )


def weight_gates(check: WeightCheck) -> tuple[Gate, ...]:
    """Return the gates on the numbers of the graph, none of which may differ from what was decided.

    A row that has lost the original's is a WARN, since where inputs are correlated the weights of one row can make up
    for each other.
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
    """Return the gate that blocks where the original is not the model that transformers loads; none if unknown."""
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
    """Return the gate on lower bounds of the divergence: a WARN where they hide much of it."""
    # Where there is no divergence, none is hidden.
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
    """Return the gravest verdict of all gates."""
    return worst(gate.verdict for gate in gates)


def judged_estimates(row: LanguageFidelity, policy: Gates, stage: Stage = ALL_TEXT) -> tuple[JudgedLimit, ...]:
    """Return every estimate of one language that has a limit, as of the look ``stage`` at its text."""
    limits = policy.limits(row.language)
    assert limits.kl_mean_nats and limits.ln_perplexity_ratio and limits.top1_agreement
    ratio, disagreement = row.ln_perplexity_ratio, row.top1_disagreement
    return (
        JudgedLimit("Mean KL divergence", "nats/token", row, row.kl, limits.kl_mean_nats, stage=stage),
        JudgedLimit("ln perplexity ratio", "nats/token", row, ratio, limits.ln_perplexity_ratio, stage=stage),
        JudgedLimit(
            "Top-1 agreement", "share", row, disagreement, 1 - limits.top1_agreement, complement=True, stage=stage
        ),
    )


def _estimated(test: JudgedLimit, broken: bool, policy: Gates, tests: int) -> Gate:
    value = test.estimate.value
    lower, upper = test.bounds(policy.confidence)
    if broken:
        verdict = Verdict.BLOCK
    elif not upper <= test.limit:
        verdict = Verdict.INCONCLUSIVE
    else:
        verdict = Verdict.WARN if lower > policy.warn_at * test.limit else Verdict.PASS
    limit, needed = test.limit, None
    if verdict is Verdict.INCONCLUSIVE:
        needed = documents_needed(test.estimate, test.limit, test.stage.confidence(policy.confidence), tests)
        # The documents that there are did not decide, whatever the estimate expects of them.
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
    """Return what the unfavourable bound leaves of the limit; it is smallest where the limit is nearest to breaking."""
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
    """Return a gate on a count: PASS on the right side of the limit, else ``otherwise``; NaN is on no side."""
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
