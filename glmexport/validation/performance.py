"""Time to first token, rates, memory, energy and placement of a bundle, in turns with the original where that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import Manifest
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.checkpoint.layouts import FP8
from glmexport.engine.placement import placement
from glmexport.results.performance import Figure, Interval, Performance, Speed, SpeedRatios
from glmexport.validation import bootstrap
from glmexport.validation.conditions import Conditions
from glmexport.validation.runtimes import Round, RuntimeName, RuntimeRequest
from glmexport.validation.speed import MeasurementTurns, take_turns
from glmexport.wire.device.facts import memory_bandwidth

#: Share of the free memory that models may take.
_SHARE = 0.8


def measure_performance(
    bundle: Bundle, checkpoint: Checkpoint | None, prompt: Sequence[int], conditions: Conditions
) -> Performance:
    """Measure ``bundle``, and the original if it is at hand and this machine holds both.

    Args:
        bundle: the bundle.
        checkpoint: the original; None where it was captured elsewhere.
        prompt: token ids.
        conditions: how many tokens are generated and for how long, at least 2; threads, also to read memory with; and
            the confidence of each bound by itself.

    Raises:
        MachineError: a process failed, for example for lack of memory.
    """
    plan, confidence, threads = conditions.plan, conditions.policy.confidence, conditions.threads
    bandwidth = memory_bandwidth(threads)
    absent = _absent(bundle.manifest, checkpoint)

    def request(runtime: RuntimeName, where: Path, threads: int) -> RuntimeRequest:
        return RuntimeRequest(
            runtime=runtime,
            directory=str(where),
            prompt=tuple(prompt),
            generated_tokens=plan.generated_tokens,
            threads=threads,
        )

    requests = [request("onnxruntime-genai", bundle.directory, conditions.bundle_threads)]
    if not absent and checkpoint is not None:
        # The directory is that of the base: transformers would need the whole model to merge an adapter, and a merged
        # matrix has the same shape and so the same speed.
        requests.append(request("transformers", checkpoint.path, threads))
    ours, *others = take_turns(requests, plan.speed_seconds, conditions.progress)
    original = others[0] if others else None
    per_token = bundle.manifest.precision.bytes_per_decoded_token
    return Performance(
        prompt_tokens=len(prompt),
        generated_tokens=plan.generated_tokens,
        rounds=len(ours.rounds),
        original=_speed(original, len(prompt), confidence) if original else None,
        original_absent_because=absent,
        bundle=_speed(ours, len(prompt), confidence),
        ratios=_ratios(ours, original, len(prompt), confidence) if original else None,
        placement=placement(ours.nodes, bundle.target.provider.name),
        memory_bandwidth_bytes_per_s=bandwidth,
        bytes_read_per_token=per_token,
        roofline_decode_tokens_per_s=None if bandwidth is None else bandwidth / per_token,
    )


def device_performance(
    turns: MeasurementTurns,
    manifest: Manifest,
    prompt_tokens: int,
    generated_tokens: int,
    bandwidth: float | None,
    confidence: float,
) -> Performance:
    """Return the performance that a device timed, which has no original beside it."""
    per_token = manifest.precision.bytes_per_decoded_token
    return Performance(
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        rounds=len(turns.rounds),
        original=None,
        original_absent_because=_absent(manifest, None),
        bundle=_speed(turns, prompt_tokens, confidence),
        ratios=None,
        placement=placement(turns.nodes, manifest.target.provider.name),
        memory_bandwidth_bytes_per_s=bandwidth,
        bytes_read_per_token=per_token,
        roofline_decode_tokens_per_s=None if bandwidth is None else bandwidth / per_token,
    )


def _absent(manifest: Manifest, checkpoint: Checkpoint | None) -> str | None:
    """Return why the original cannot be measured; None if it can."""
    if checkpoint is None:
        return "The original was captured elsewhere; it is not on this machine."
    if checkpoint.stored.layout == FP8:
        return "The original is an fp8 checkpoint, which transformers has kernels for on accelerators only."
    if checkpoint.stored.layout:
        return (
            f"The original is a checkpoint quantized by {checkpoint.stored.layout}, whose speed is that of the kernels "
            "it would be loaded with."
        )
    original, bundle = manifest.source.parameters * 4, manifest.precision.weight_bytes
    if original + bundle > psutil.virtual_memory().available * _SHARE:
        return (
            f"The original needs about {original / 2**30:.0f} GiB in fp32 beside the bundle, more than this machine "
            "has free."
        )
    return None


def _decode_rate(taken: Round) -> float:
    return len(taken.steps_s) / sum(taken.steps_s)


def _energy(taken: Round) -> float:
    """J per token; of a machine that does not tell it, nobody asks."""
    assert taken.decode_j is not None
    return taken.decode_j / len(taken.steps_s)


def _speed(turns: MeasurementTurns, prompt: int, confidence: float) -> Speed:
    def figure(of: Callable[[Round], float], *, more_is_better: bool = False) -> Figure:
        return bootstrap.figure([of(taken) for taken in turns.rounds], confidence, more_is_better=more_is_better)

    absent = turns.memory.energy_absent_because
    return Speed(
        runtime=turns.runtime,
        threads=turns.threads,
        load_s=bootstrap.figure([turns.load_s], confidence),
        ttft_s=figure(lambda taken: taken.ttft_s),
        prefill_tokens_per_s=figure(lambda taken: prompt / taken.ttft_s, more_is_better=True),
        decode_tokens_per_s=figure(_decode_rate, more_is_better=True),
        peak_memory_bytes=turns.memory.bytes,
        peak_memory_source=turns.memory.source,
        energy_j_per_token=None if absent else figure(_energy),
        energy_absent_because=absent,
    )


def _ratios(bundle: MeasurementTurns, original: MeasurementTurns, prompt: int, confidence: float) -> SpeedRatios:
    def ratio(of: Callable[[Round], float]) -> Interval:
        ours, theirs = ([of(taken) for taken in turns.rounds] for turns in (bundle, original))
        return bootstrap.ratio(ours, theirs, confidence)

    return SpeedRatios(
        ttft_s=ratio(lambda taken: taken.ttft_s),
        prefill_tokens_per_s=ratio(lambda taken: prompt / taken.ttft_s),
        decode_tokens_per_s=ratio(_decode_rate),
        energy_j_per_token=None if bundle.memory.energy_absent_because else ratio(_energy),
    )
