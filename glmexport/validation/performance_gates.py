"""The gates on a bundle's speed on this machine, and on the execution provider of its nodes."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Literal

from glmexport.foundation.target import Gates, PerformanceLimits
from glmexport.results.gate import Gate
from glmexport.results.performance import Interval, Performance, Placement
from glmexport.results.record import Verdict


def performance_gates(performance: Performance | None, policy: Gates, absent: str | None = None) -> tuple[Gate, ...]:
    """Return the gates on the placement and on each limit of the policy.

    ``absent`` says why nothing was measured, where nothing was.
    """
    if performance is None:
        return tuple(_unmeasured(*limit, absent) for limit in _set_limits(policy.performance))
    return placement_gate(performance.placement), *_limits(performance, policy)


def _set_limits(limits: PerformanceLimits) -> Iterator[tuple[str, float, str, Literal["at most", "at least"]]]:
    """Return name, limit, unit and direction of each limit that is set."""
    if limits.max_ttft_s:
        yield "Time to first token", limits.max_ttft_s, "s", "at most"
    if limits.min_prefill_tokens_per_s:
        yield "Prefill", limits.min_prefill_tokens_per_s, "tokens/s", "at least"
    if limits.min_decode_tokens_per_s:
        yield "Decode", limits.min_decode_tokens_per_s, "tokens/s", "at least"
    if limits.min_decode_ratio:
        yield "Decode, bundle / original", limits.min_decode_ratio, "ratio", "at least"
    if limits.max_peak_memory:
        yield "Peak memory", limits.max_peak_memory, "bytes", "at most"
    if limits.max_energy_j_per_token:
        yield "Energy per token", limits.max_energy_j_per_token, "J", "at most"


def placement_gate(placement: Placement) -> Gate:
    """Return the gate that allows no node on another provider than the target's.

    A single node on the CPU can take most of the time.
    """
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
    bundle, ratios = performance.bundle, performance.ratios
    measured: dict[str, tuple[Interval | None, str | None]] = {
        "Time to first token": (bundle.ttft_s, None),
        "Prefill": (bundle.prefill_tokens_per_s, None),
        "Decode": (bundle.decode_tokens_per_s, None),
        "Decode, bundle / original": (
            ratios.decode_tokens_per_s if ratios else None,
            performance.original_absent_because,
        ),
        "Energy per token": (bundle.energy_j_per_token, bundle.energy_absent_because),
    }
    for name, limit, unit, direction in _set_limits(policy.performance):
        figure, absent = measured.get(name, (None, bundle.peak_memory_source))
        if figure is not None:
            yield _estimated(name, figure, limit, unit, direction)
        elif name == "Peak memory" and bundle.peak_memory_bytes is not None:
            yield _memory(bundle.peak_memory_bytes, bundle.peak_memory_source, limit)
        else:
            yield _unmeasured(name, limit, unit, direction, absent)


def _estimated(
    name: str, measured: Interval, limit: float, unit: str, direction: Literal["at most", "at least"]
) -> Gate:
    """Return PASS where even the unfavourable bound keeps the limit, BLOCK where not even the favourable one does."""
    best, worst = (measured.lower, measured.upper) if direction == "at most" else (measured.upper, measured.lower)

    def keeps(value: float) -> bool:
        return value <= limit if direction == "at most" else value >= limit

    verdict = Verdict.INCONCLUSIVE
    # A value that is not a number keeps no limit and yet proves nothing.
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
    """Return the gate of a limit on what could not be measured, which is not kept."""
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


def _memory(measured: int, source: str, limit: float) -> Gate:
    return Gate(
        name="Peak memory",
        language=None,
        value=measured,
        limit=limit,
        unit="bytes",
        direction="at most",
        sample=f"one process, {source}",
        verdict=Verdict.PASS if measured <= limit else Verdict.BLOCK,
    )
