"""The report of a bundle, from its manifest and what its validation measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from glmexport import __version__
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import Manifest
from glmexport.bundle.records import AllocatedGroup, QuantizedMatrix
from glmexport.foundation import machine
from glmexport.foundation.target import Policy
from glmexport.report.document import (
    CalibrationSummary,
    CoverageResult,
    GroupResult,
    LinearResult,
    Machine,
    PolicySummary,
    QuantizationSummary,
    Report,
    Size,
    Subject,
)
from glmexport.results.device import DeviceResult
from glmexport.results.fidelity import Overlap
from glmexport.results.record import worst
from glmexport.validation.run import Validation


@dataclass(frozen=True)
class BuildCost:
    """The cost of quantizing: wall seconds over all attempts, and the peak resident memory of this process."""

    seconds: float
    peak_memory_bytes: int
    device: str = "cpu"
    #: Peak memory of a device that has memory of its own, else 0.
    peak_device_bytes: int = 0


def assemble(
    bundle: Bundle, validation: Validation, policy: Policy, *, name: str, command: str, build: BuildCost | None
) -> Report:
    """Return the report of everything known about ``bundle`` on this machine.

    ``name`` is its name in its final place; ``build`` is None where it was built some other time.
    """
    return _report(bundle, validation, policy, _this_machine(), name=name, command=command, build=build)


def assemble_devices(
    bundle: Bundle, devices: Sequence[DeviceResult], validation: Validation, policy: Policy, *, command: str
) -> Report:
    """Return the report of everything that ``devices`` measured of ``bundle``.

    ``validation`` is that of the ``detailed`` one.
    """
    there = _device(detailed(devices))
    return _report(
        bundle, validation, policy, there, name=bundle.name, command=command, devices=tuple(devices)
    )


def detailed(devices: Sequence[DeviceResult]) -> DeviceResult:
    """Return the first device with the worst verdict among those that answered."""
    return max((device for device in devices if device.fidelity), key=lambda device: device.verdict.severity)


def _not_run(devices: Sequence[DeviceResult]) -> Iterator[str]:
    for device in devices:
        if device.failure:
            yield f"Nothing was measured on {device.name}."
        elif device.facts and device.facts.emulated:
            yield (
                f"{device.name} is not the device itself. {device.facts.emulated} Speed, memory and where "
                "nodes run were not measured on a real one."
            )


@dataclass(frozen=True)
class _Measured:
    """The machine that a report's details were measured on, and the libraries there and here."""

    machine: Machine
    versions: dict[str, str]


def _report(
    bundle: Bundle,
    validation: Validation,
    policy: Policy,
    measured_on: _Measured,
    *,
    name: str,
    command: str,
    build: BuildCost | None = None,
    devices: tuple[DeviceResult, ...] = (),
) -> Report:
    manifest = bundle.manifest
    return Report(
        schema_version=1,
        glmexport_version=__version__,
        verdict=worst([validation.verdict, *(device.verdict for device in devices)]),
        gates=validation.gates,
        policy=PolicySummary(source=policy.source, gates=policy.gates),
        subject=Subject(
            bundle=name,
            bundle_digest=bundle.digest,
            target=manifest.target.name,
            recipe=manifest.recipe.name,
            family=manifest.family,
            checkpoint=manifest.source.name,
            checkpoint_digest=manifest.source.digest,
            adapter=manifest.source.adapter.name if manifest.source.adapter else None,
            adapter_digest=manifest.source.adapter.digest if manifest.source.adapter else None,
            languages=tuple(row.language for row in validation.fidelity.languages),
        ),
        size=Size(
            parameters=manifest.source.parameters,
            original_bytes=manifest.source.bytes,
            bundle_bytes=bundle.bytes,
            weight_bytes=manifest.precision.weight_bytes,
            bits_per_weight=manifest.precision.bits_per_weight,
            bits_per_weight_linears=manifest.precision.bits_per_weight_linears,
        ),
        fidelity=validation.fidelity,
        reference=validation.reference,
        arithmetic=validation.arithmetic,
        weights=validation.weights,
        prompts=validation.prompts,
        behaviour=validation.behaviour,
        shares=validation.shares,
        routing=validation.routing,
        performance=validation.performance,
        performance_absent_because=validation.performance_absent_because,
        devices=devices,
        detailed=detailed(devices).name if devices else None,
        quantization=_quantization(manifest, build),
        calibration=_calibration(manifest),
        machine=measured_on.machine,
        versions=measured_on.versions,
        command=command,
        limits=(*_limits(validation), *_drafts(manifest), *_left_out(manifest), *_not_run(devices)),
    )


def _this_machine() -> _Measured:
    here = Machine(
        system=machine.system_name(),
        processor=machine.processor_name(),
        cores=machine.cores(),
        memory_bytes=machine.memory_bytes(),
        instruction_sets=machine.instruction_sets(),
    )
    return _Measured(here, machine.library_versions())


def _device(device: DeviceResult) -> _Measured:
    facts = device.facts
    assert facts is not None
    there = Machine(
        system=facts.system,
        processor=facts.processor,
        cores=facts.cores,
        memory_bytes=facts.memory_bytes,
        instruction_sets=facts.instruction_sets,
    )
    versions = {f"{key} of the device": value for key, value in facts.versions.items()}
    return _Measured(there, machine.library_versions() | versions)


def _quantization(manifest: Manifest, build: BuildCost | None) -> QuantizationSummary | None:
    if not manifest.matrices:
        return None
    return QuantizationSummary(
        linears=tuple(_linear(matrix) for matrix in manifest.matrices),
        groups=tuple(_group(group) for group in manifest.allocation),
        experts=tuple(
            CoverageResult(layer=layer.layer, tokens=layer.tokens, cold=layer.cold) for layer in manifest.experts
        ),
        fallbacks=tuple(f"{matrix.key}: {matrix.fallback}" for matrix in manifest.matrices if matrix.fallback),
        seconds=build.seconds if build else math.nan,
        peak_memory_bytes=build.peak_memory_bytes if build else 0,
        device=build.device if build else "",
        peak_device_bytes=build.peak_device_bytes if build else 0,
    )


def _group(group: AllocatedGroup) -> GroupResult:
    return GroupResult(
        name=group.name,
        matrices=group.keys,
        bits=group.format.bits,
        group_size=group.format.group_size,
        symmetric=group.format.symmetric,
        codec=group.format.codec,
        stored_bits=group.bits,
        loss_nats=group.loss_nats,
        tried=group.tried,
        expert_part=group.expert_part,
        cold=group.cold,
    )


def _linear(matrix: QuantizedMatrix) -> LinearResult:
    def measured(value: float | None) -> float:
        return math.nan if value is None else value

    return LinearResult(
        name=matrix.key,
        relative_error=measured(matrix.relative_error),
        round_to_nearest_error=measured(matrix.round_to_nearest_error),
        damping=measured(matrix.damping),
        **matrix.shared(),
    )


def _calibration(manifest: Manifest) -> CalibrationSummary | None:
    source = manifest.calibration
    if source is None:
        return None
    return CalibrationSummary(
        tokens=source.tokens,
        sequences=source.sequences,
        tokens_per_language=source.tokens_per_language,
        digest=source.digest,
        overlap=Overlap(
            calibration_documents=source.documents,
            evaluation_documents=source.evaluation_documents,
            shared_documents=source.shared_documents,
            shared_lines=source.shared_lines,
        ),
    )


def _limits(validation: Validation) -> tuple[str, ...]:
    rows = validation.fidelity.languages
    least = min(rows, key=lambda row: row.positions)
    return (
        "Fidelity is measured on next-token distributions over written text of a few kinds (documentation, and a legal "
        "text).",
        *_answered(validation),
        f"Languages other than the {len(rows)} listed are not covered; the one with the least text, {least.language}, "
        f"rests on {least.positions} positions of {least.documents} documents.",
        _lengths(validation),
        "Speed is that of this machine, with one sequence at a time, at the time of the measurement.",
        "The bounds say what other documents of the same kind would show; text of another kind they do not cover.",
        *_captured(validation),
        *_ended_early(validation),
        *_unchecked(validation),
    )


def _drafts(manifest: Manifest) -> tuple[str, ...]:
    if manifest.draft is None:
        return ()
    return (
        f"How often the drafts of {manifest.draft.file} are accepted is not measured; the speed is that without them.",
    )


def _left_out(manifest: Manifest) -> tuple[str, ...]:
    """Return what the bundle lacks of its original, one sentence a reason."""
    keys: dict[str, list[str]] = {}
    for key, reason in manifest.source.unused.items():
        keys.setdefault(reason, []).append(key)
    return tuple(
        f"Not in the bundle: {names[0]}{f' and {len(names) - 1} more tensors' if len(names) > 1 else ''} ({reason})."
        for reason, names in keys.items()
    )


def _lengths(validation: Validation) -> str:
    speed = validation.performance
    measured = f"speed is measured with a prompt of {speed.prompt_tokens} tokens; " if speed else ""
    return f"Texts are at most a few hundred tokens long, and {measured}long contexts are not covered."


def _answered(validation: Validation) -> tuple[str, ...]:
    behaviour = validation.behaviour
    if behaviour is None:
        return ("Free answers were not compared: dialogues, tool calls and tasks are not covered.",)
    longest = max(behaviour.overall.tokens_original, behaviour.overall.tokens_bundle) / behaviour.overall.answers
    tasks = "" if behaviour.tasks else " Tasks of your own were not among them (--tasks)."
    return (
        f"Free answers are greedy and short, {longest:.0f} tokens on average; long dialogues, sampling and chains of "
        f"tool calls are not covered.{tasks}",
    )


def _ended_early(validation: Validation) -> tuple[str, ...]:
    early = [looks.language for looks in validation.fidelity.looks if looks.ended_early]
    if not early:
        return ()
    return (
        f"The text of {len(early)} languages ended once their gates were decided ({', '.join(early)}): the rest of it "
        "was not asked about, and estimates are conditional on that.",
    )


def _unchecked(validation: Validation) -> tuple[str, ...]:
    check = validation.reference
    if check is None or check.absent_because is None:
        return ()
    return (f"The original was not checked against transformers' whole model: {check.absent_because}.",)


def _captured(validation: Validation) -> tuple[str, ...]:
    bound = validation.fidelity.capture
    if bound is None:
        return ()
    return (
        f"The original was captured with its {bound.top_k} most likely tokens a position and the mass of all others as "
        f"one, so every divergence is a lower bound. At {bound.audit_positions} positions where its whole distribution "
        f"was kept, it is {bound.kl_mean_partition_nats:.4g} nats so, and {bound.kl_mean_nats:.4g} over the whole "
        "vocabulary. Where the divergence comes from, and the original's speed, were not measured.",
    )
