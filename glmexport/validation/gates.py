"""The target's gates, applied to every language that has enough text to be judged."""

from __future__ import annotations

import math
from collections.abc import Iterable

from glmexport.target import Gates
from glmexport.validation.results import Fidelity, Gate, LanguageFidelity, Verdict, badness, worst

#: With about as many tokens as columns GPTQ follows chance, and can end behind rounding to nearest.
EFFECTIVE_TOKENS = 2.0


def apply_gates(fidelity: Fidelity, gates: Gates) -> tuple[Gate, ...]:
    """Every gate in the language where it is worst; and one gate a language that has too little text.

    A language below ``minimum_positions`` is INCONCLUSIVE, never PASS.
    """
    judged = [row for row in fidelity.languages if row.positions >= gates.minimum_positions]
    results = [
        _gate(
            "Enough text to judge",
            row.language,
            row.positions,
            gates.minimum_positions,
            "positions",
            f"{row.documents} documents",
            at_least=True,
            otherwise=Verdict.INCONCLUSIVE,
        )
        for row in fidelity.languages
        if row.positions < gates.minimum_positions
    ]
    if judged:
        kl = max(judged, key=lambda row: badness(row.kl_mean_nats))
        ratio = max(judged, key=lambda row: badness(_ln_ratio(row)))
        top1 = min(judged, key=lambda row: row.top1_agreement)
        per_token, share = "nats/token", "share"
        results += [
            _gate("Mean KL divergence", kl.language, kl.kl_mean_nats, gates.kl_mean_nats, per_token, _sample(kl)),
            _gate(
                "ln perplexity ratio",
                ratio.language,
                _ln_ratio(ratio),
                gates.ln_perplexity_ratio,
                per_token,
                _sample(ratio),
            ),
            _gate(
                "Top-1 agreement",
                top1.language,
                top1.top1_agreement,
                gates.top1_agreement,
                share,
                _sample(top1),
                at_least=True,
            ),
        ]
    return tuple(results)


def build_gates(fallbacks: int, effective_tokens: float | None, matrices: int) -> tuple[Gate, ...]:
    """What the build itself has to answer for; nobody may overlook it, so each is a WARN.

    No matrix may have been quantized in a weaker way than the recipe asks for, and no Hessian may rest on so little
    text that it describes chance: ``effective_tokens`` is the fewest a column of any matrix, None if unmeasured.
    """
    sample = f"{matrices} matrices"
    gates = [_gate("Matrices that fell back", None, fallbacks, 0, "matrices", sample, otherwise=Verdict.WARN)]
    if effective_tokens is not None:
        gates.append(
            _gate(
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


def verdict_of(gates: Iterable[Gate]) -> Verdict:
    """The gravest verdict of all gates."""
    return worst(gate.verdict for gate in gates)


def _ln_ratio(row: LanguageFidelity) -> float:
    return math.log(row.perplexity_bundle / row.perplexity_original)


def _sample(row: LanguageFidelity) -> str:
    return f"{row.positions} positions of {row.documents} documents"


def _gate(
    name: str,
    language: str | None,
    value: float,
    limit: float,
    unit: str,
    sample: str,
    *,
    at_least: bool = False,
    otherwise: Verdict = Verdict.BLOCK,
) -> Gate:
    """PASS on the right side of the limit, else ``otherwise``; not a number is on no side."""
    held = value >= limit if at_least else value <= limit
    return Gate(
        name=name,
        language=language,
        value=value,
        limit=limit,
        unit=unit,
        direction="at least" if at_least else "at most",
        sample=sample,
        verdict=Verdict.PASS if held else otherwise,
    )
