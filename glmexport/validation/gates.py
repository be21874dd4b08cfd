"""The target's gates, applied to every language that has enough text to be judged."""

from __future__ import annotations

import math
from collections.abc import Iterable

from glmexport.target import Gates
from glmexport.validation.results import Fidelity, Gate, LanguageFidelity, Verdict, badness, worst


def apply_gates(fidelity: Fidelity, gates: Gates) -> tuple[Gate, ...]:
    """Every gate in the language where it is worst; and one gate a language that has too little text.

    A language below ``minimum_positions`` is INCONCLUSIVE, never PASS.
    """
    judged = [row for row in fidelity.languages if row.positions >= gates.minimum_positions]
    results = [
        Gate(
            name="Enough text to judge",
            language=row.language,
            value=row.positions,
            limit=gates.minimum_positions,
            unit="positions",
            direction="at least",
            sample=f"{row.documents} documents",
            verdict=Verdict.INCONCLUSIVE,
        )
        for row in fidelity.languages
        if row.positions < gates.minimum_positions
    ]
    if judged:
        kl = max(judged, key=lambda row: badness(row.kl_mean_nats))
        ratio = max(judged, key=lambda row: badness(_ln_ratio(row)))
        top1 = min(judged, key=lambda row: row.top1_agreement)
        results += [
            _at_most("Mean KL divergence", kl, kl.kl_mean_nats, gates.kl_mean_nats, "nats/token"),
            _at_most("ln perplexity ratio", ratio, _ln_ratio(ratio), gates.ln_perplexity_ratio, "nats/token"),
            Gate(
                name="Top-1 agreement",
                language=top1.language,
                value=top1.top1_agreement,
                limit=gates.top1_agreement,
                unit="share",
                direction="at least",
                sample=_sample(top1),
                verdict=Verdict.PASS if top1.top1_agreement >= gates.top1_agreement else Verdict.BLOCK,
            ),
        ]
    return tuple(results)


def fallback_gate(fallbacks: int, matrices: int) -> Gate:
    """No matrix may have been quantized in a weaker way than the recipe asks for without somebody deciding so."""
    return Gate(
        name="Matrices that fell back",
        language=None,
        value=fallbacks,
        limit=0,
        unit="matrices",
        direction="at most",
        sample=f"{matrices} matrices",
        verdict=Verdict.PASS if not fallbacks else Verdict.WARN,
    )


def verdict_of(gates: Iterable[Gate]) -> Verdict:
    """The gravest verdict of all gates."""
    return worst(gate.verdict for gate in gates)


def _ln_ratio(row: LanguageFidelity) -> float:
    return math.log(row.perplexity_bundle / row.perplexity_original)


def _sample(row: LanguageFidelity) -> str:
    return f"{row.positions} positions of {row.documents} documents"


def _at_most(name: str, row: LanguageFidelity, value: float, limit: float, unit: str) -> Gate:
    return Gate(
        name=name,
        language=row.language,
        value=value,
        limit=limit,
        unit=unit,
        direction="at most",
        sample=_sample(row),
        verdict=Verdict.PASS if value <= limit else Verdict.BLOCK,
    )
