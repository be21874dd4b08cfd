"""What the bundle has to reach on this machine, and that its nodes ran where the target says."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Literal

from glmexport.target import Gates
from glmexport.validation.results import Gate, Interval, Performance, Placement, Speed, Verdict


def performance_gates(performance: Performance, policy: Gates) -> tuple[Gate, ...]:
    """The placement, and each limit that the policy sets."""
    return placement_gate(performance.placement), *_limits(performance, policy)


def placement_gate(placement: Placement) -> Gate:
    """Not a node may run on another provider than the target's: a single one on the CPU can take most of the time."""
    found = placement.unexpected
    told = f"{placement.nodes} nodes that ran"
    if placement.on_purpose:
        told += f", of which {len(placement.on_purpose)} compute shapes on the CPU, as ONNX Runtime means them to"
    if found:
        told += f"; first {found[0]}"
    verdict = Verdict.BLOCK if found else Verdict.PASS if placement.nodes else Verdict.INCONCLUSIVE
    return Gate(
        name="Nodes on another provider",
        language=None,
        value=len(found),
        limit=0,
        unit="nodes",
        direction="at most",
        sample=told,
        verdict=verdict,
    )


def _limits(performance: Performance, policy: Gates) -> Iterator[Gate]:
    limits, bundle, ratios = policy.performance, performance.bundle, performance.ratios
    if limits.max_ttft_s:
        yield _estimated("Time to first token", bundle.ttft_s, limits.max_ttft_s, "s", "at most")
    if limits.min_prefill_tokens_per_s:
        measured = bundle.prefill_tokens_per_s
        yield _estimated("Prefill", measured, limits.min_prefill_tokens_per_s, "tokens/s", "at least")
    if limits.min_decode_tokens_per_s:
        measured = bundle.decode_tokens_per_s
        yield _estimated("Decode", measured, limits.min_decode_tokens_per_s, "tokens/s", "at least")
    if limits.min_decode_ratio:
        name, limit = "Decode, bundle / original", limits.min_decode_ratio
        if ratios:
            yield _estimated(name, ratios.decode_tokens_per_s, limit, "ratio", "at least")
        else:
            yield _unmeasured(name, limit, "ratio", "at least", performance.original_absent_because)
    if limits.max_peak_memory:
        yield _memory(bundle, limits.max_peak_memory)
    if limits.max_energy_j_per_token:
        name, limit = "Energy per token", limits.max_energy_j_per_token
        if bundle.energy_j_per_token:
            yield _estimated(name, bundle.energy_j_per_token, limit, "J", "at most")
        else:
            yield _unmeasured(name, limit, "J", "at most", bundle.energy_absent_because)


def _estimated(
    name: str, measured: Interval, limit: float, unit: str, direction: Literal["at most", "at least"]
) -> Gate:
    """PASS where even the unfavourable bound keeps the limit, BLOCK where not even the favourable one does."""
    best, worst = (measured.lower, measured.upper) if direction == "at most" else (measured.upper, measured.lower)

    def keeps(value: float) -> bool:
        return value <= limit if direction == "at most" else value >= limit

    verdict = Verdict.INCONCLUSIVE
    # What is not a number keeps no limit and yet proves nothing.
    if isfinite(measured.value) and keeps(worst):
        verdict = Verdict.PASS
    elif isfinite(measured.value) and not keeps(best):
        verdict = Verdict.BLOCK
    return Gate(
        name=name,
        language=None,
        value=measured.value,
        limit=limit,
        unit=unit,
        direction=direction,
        sample=f"median of {measured.n} rounds",
        verdict=verdict,
        lower=measured.lower,
        upper=measured.upper,
        confidence=measured.confidence,
    )


def _unmeasured(name: str, limit: float, unit: str, direction: Literal["at most", "at least"], why: str | None) -> Gate:
    """A limit on what could not be measured is not kept."""
    return Gate(
        name=name,
        language=None,
        value=float("nan"),
        limit=limit,
        unit=unit,
        direction=direction,
        sample=why or "not measured",
        verdict=Verdict.INCONCLUSIVE,
    )


def _memory(bundle: Speed, limit: int) -> Gate:
    return Gate(
        name="Peak memory",
        language=None,
        value=bundle.peak_memory_bytes,
        limit=limit,
        unit="bytes",
        direction="at most",
        sample=f"one process, {bundle.peak_memory_source}",
        verdict=Verdict.PASS if bundle.peak_memory_bytes <= limit else Verdict.BLOCK,
    )
