"""The stages in order: a checkpoint becomes a validated bundle for each target. Resumable at every block."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from glmexport import __version__
from glmexport.architecture import Architecture, Reference
from glmexport.architecture.reference import CPU
from glmexport.bundle import (
    Manifest,
    Source,
    read_manifest,
    verify_files,
    write_bundle,
)
from glmexport.calibrating import cache_text, calibration_context, calibration_documents
from glmexport.calibration import CalibrationSet, Document, evaluation_documents, pack
from glmexport.device import device_name, peak_device_memory, plan_on, running_on
from glmexport.errors import BundleError
from glmexport.job import Job, Original, refuse_existing, refuse_formats, require_space
from glmexport.progress import Progress
from glmexport.provenance import calibration_source, own_fingerprints, source_of
from glmexport.quantization import MemoryPlan, QuantizedMatrix, Walk, WorkDirectory
from glmexport.quantization.weights import Weights
from glmexport.recipe import Recipe
from glmexport.report.assemble import BuildCost, assemble
from glmexport.report.document import Report
from glmexport.report.write import write_report
from glmexport.target import Policy
from glmexport.validation.behaviour.tasks import Task
from glmexport.validation.capture import CapturedReference
from glmexport.validation.machine import peak_memory
from glmexport.validation.run import ValidationPlan, validate, validate_captured
from glmexport.validation.unrun import Unrun, can_run, validate_unrun


@dataclass(frozen=True)
class BuildOptions:
    """What a build is free to choose."""

    threads: int
    max_memory_bytes: int | None = None
    calibration: tuple[Path, ...] = ()
    #: Text of the user's to judge on as well.
    evaluation: tuple[Path, ...] = ()
    #: Where to quantize.
    device: torch.device = CPU
    force: bool = False
    command: str = ""
    validation: ValidationPlan = field(default_factory=ValidationPlan)
    #: What a bundle has to keep; None: the gates of its target.
    policy: Policy | None = None
    #: Of the user's, asked with the other free answers.
    tasks: tuple[Task, ...] = ()
    #: Of the bundle's sessions; None: those of its target, or else ``threads``.
    bundle_threads: int | None = None


@dataclass(frozen=True)
class Built:
    """A bundle in its place, and its report."""

    directory: Path
    manifest: Manifest
    report: Report


@dataclass(frozen=True)
class BuiltUnrun:
    """A bundle in its place that this machine cannot run, and what could be said of it all the same."""

    directory: Path
    manifest: Manifest
    unrun: Unrun


def build(
    original: Original, jobs: Sequence[Job], options: BuildOptions, progress: Progress
) -> list[Built | BuiltUnrun]:
    """Build, validate and put in place every job's bundle. Jobs of one recipe share one quantization.

    A bundle whose execution provider is not on this machine is written all the same, and not run.

    Raises:
        InputError: an output exists and ``force`` is off, or the calibration text is too small.
        MachineError: disk or memory do not suffice; nothing is started then.
    """
    torch.set_num_threads(options.threads)
    for job in jobs:
        refuse_formats(original, job)
        refuse_existing(job.directory, options.force)
    if any(original.drafts(job.target) for job in jobs):
        original = original.sharing_tables()
    prepared = []
    for recipe in {job.recipe.digest(): job.recipe for job in jobs}.values():
        same = [job for job in jobs if job.recipe.digest() == recipe.digest()]
        memory, documents, calibration = _prepared(original, recipe, options)
        # Before anything takes long: may it be used?
        evaluation_documents(options.evaluation, original.tokenizer, own_fingerprints(documents))
        prepared.append((recipe, same, memory, documents, calibration))
    for recipe, same, *_ in prepared:
        require_space(original, recipe, same[0].directory.parent)
    with ExitStack() as locks:
        works = []
        for recipe, same, memory, _, calibration in prepared:
            parent = same[0].directory.parent
            works.append(_work_directory(original, recipe, calibration, memory, options, parent, progress))
            locks.enter_context(works[-1].locked())
        built: list[Built | BuiltUnrun] = []
        try:
            for (recipe, same, memory, documents, calibration), work in zip(prepared, works, strict=True):
                drafting = next((job.target for job in same if original.drafts(job.target)), same[0].target)
                architecture = original.architecture_for(drafting)
                walk = _walked(original, architecture, recipe, calibration, work, memory, options, progress)
                for job in same:
                    built.append(_finish(original, job, walk, calibration, documents, options, progress))
            for bundle in built:
                refuse_existing(bundle.directory, options.force)
                put_in_place(partial_of(bundle.directory), bundle.directory)
        except BaseException:
            for job in jobs:
                shutil.rmtree(partial_of(job.directory), ignore_errors=True)
            raise
        for work in works:
            shutil.rmtree(work.path)
    return built


def _prepared(
    original: Original, recipe: Recipe, options: BuildOptions
) -> tuple[MemoryPlan, list[Document], CalibrationSet | None]:
    """What a walk needs beside the checkpoint."""
    memory = plan_on(options.device, original.architecture, recipe, options.max_memory_bytes)
    documents = calibration_documents(original, recipe, options.calibration)
    if recipe.calibration is None:
        return memory, documents, None
    context = calibration_context(original)
    return memory, documents, pack(documents, original.tokenizer, recipe.calibration, context)


def quantize(original: Original, recipe: Recipe, options: BuildOptions, parent: Path, progress: Progress) -> Weights:
    """The weights that a bundle of ``recipe`` would have, in a work directory below ``parent`` that stays.

    Raises:
        InputError: the calibration text is too small.
        MachineError: memory does not suffice, or somebody else is at work on the same.
    """
    memory, _, calibration = _prepared(original, recipe, options)
    work = _work_directory(original, recipe, calibration, memory, options, parent, progress)
    with work.locked():
        walk = _walked(original, original.architecture, recipe, calibration, work, memory, options, progress)
    return Weights(walk.checkpoint, original.architecture, work, walk.parts)


def _walked(
    original: Original,
    architecture: Architecture,
    recipe: Recipe,
    calibration: CalibrationSet | None,
    work: WorkDirectory,
    memory: MemoryPlan,
    options: BuildOptions,
    progress: Progress,
) -> Walk:
    """Quantized to the end."""
    device = options.device
    walk = Walk(original.checkpoint, architecture, recipe, calibration, work, memory, progress, device)
    with running_on(device):
        walk.run()
    return walk


def partial_of(directory: Path) -> Path:
    """Where an output is until all outputs of its command are done; a command that fails leaves nothing there."""
    return directory.with_name(f".{directory.name}.partial")


def validate_bundle(directory: Path, original: Original, options: BuildOptions, progress: Progress) -> Built:
    """Validate a bundle against ``original`` on this machine, and write the report into it.

    Raises:
        BundleError: the bundle was made from another checkpoint, or its files are not those of its manifest.
    """
    manifest = open_bundle(directory, original, progress)
    report = _validated(directory, directory, manifest, original, options, progress, None)
    return Built(directory, manifest, report)


def validate_captured_bundle(
    directory: Path, captured: CapturedReference, options: BuildOptions, progress: Progress
) -> Built:
    """Validate a bundle against what its original answered when it was captured, and write the report into it.

    Raises:
        BundleError: the reference is of another checkpoint, or the bundle's files are not those of its manifest.
    """
    manifest = open_captured_bundle(directory, captured)
    policy = policy_of(manifest, options)
    torch.set_num_threads(options.threads)
    validation = validate_captured(
        directory,
        manifest,
        captured,
        plan=options.validation,
        policy=policy.gates,
        threads=threads_of(manifest, options),
        progress=progress,
    )
    report = assemble(
        manifest, validation, policy, name=directory.name, directory=directory, command=options.command, build=None
    )
    write_report(report, directory)
    return Built(directory, manifest, report)


def open_bundle(directory: Path, original: Original, progress: Progress) -> Manifest:
    """The manifest of a bundle, after its files and its original have been checked against it.

    Raises:
        BundleError: the bundle was made from another checkpoint, or its files are not those of its manifest.
    """
    manifest = read_manifest(directory)
    verify_files(directory, manifest)
    step = "Give the checkpoint that it was built from with --against"
    step += ", and its adapter with --adapter." if manifest.source.adapter else " alone."
    _require_source(directory, manifest, source_of(original, progress), step)
    return manifest


def open_captured_bundle(directory: Path, captured: CapturedReference) -> Manifest:
    """The same where the original was captured.

    Raises:
        BundleError: the reference is of another checkpoint, or the bundle's files are not those of its manifest.
    """
    manifest = read_manifest(directory)
    verify_files(directory, manifest)
    _require_source(directory, manifest, captured.capture.source, "Give the reference of that checkpoint.")
    return manifest


def _require_source(directory: Path, manifest: Manifest, given: Source, next_step: str) -> None:
    if given.digest != manifest.source.digest:
        raise BundleError(
            f"{directory} was built from {manifest.source.title} ({manifest.source.digest[:19]}...), "
            f"not from {given.title} ({given.digest[:19]}...).",
            next_step=next_step,
        )


def threads_of(manifest: Manifest, options: BuildOptions) -> int:
    """Threads that the bundle runs in."""
    return options.bundle_threads or manifest.target.session.threads or options.threads


def policy_of(manifest: Manifest, options: BuildOptions) -> Policy:
    """What the bundle has to keep."""
    return options.policy or Policy(f"target {manifest.target.name}", manifest.target.gates)


def _finish(
    original: Original,
    job: Job,
    walk: Walk,
    calibration: CalibrationSet | None,
    documents: Sequence[Document],
    options: BuildOptions,
    progress: Progress,
) -> Built | BuiltUnrun:
    """Write the bundle beside its place and validate it there, as far as this machine can."""
    partial = partial_of(job.directory)
    if partial.exists():
        shutil.rmtree(partial)
    # Read once: every committed file is hashed for it.
    records, seconds = walk.records()
    manifest = _write(partial, original, job, walk, records, calibration, documents, progress)
    if not can_run(manifest):
        reference = Reference(original.checkpoint, original.architecture)
        text = evaluation_documents((), original.tokenizer, ())
        limit = options.max_memory_bytes
        unrun = validate_unrun(partial, manifest, original.checkpoint, reference, text, progress, limit)
        return BuiltUnrun(job.directory, manifest, unrun)
    cost = BuildCost(seconds, peak_memory(), device_name(options.device), peak_device_memory(options.device))
    report = _validated(partial, job.directory, manifest, original, options, progress, cost)
    return Built(job.directory, manifest, report)


def _write(
    directory: Path,
    original: Original,
    job: Job,
    walk: Walk,
    records: Sequence[QuantizedMatrix],
    calibration: CalibrationSet | None,
    documents: Sequence[Document],
    progress: Progress,
) -> Manifest:
    architecture = original.architecture_for(job.target)
    return write_bundle(
        directory,
        architecture,
        Weights(walk.checkpoint, architecture, walk.work, [*walk.parts, *walk.draft_parts]),
        Reference(original.checkpoint, architecture).rotary_tables(architecture.context_length),
        recipe=job.recipe,
        target=job.target,
        source=source_of(original, progress, job.target),
        calibration=calibration_source(calibration, documents),
        records=records,
        allocation=walk.allocation(),
        draft_records=walk.draft_records() if original.drafts(job.target) else (),
        tokenizer_files=original.tokenizer.files,
        cache_text=cache_text(calibration),
        progress=progress,
    )


def put_in_place(partial: Path, directory: Path) -> None:
    """Rename; what was there before is removed only after the new output has its place."""
    replaced = directory.with_name(f".{directory.name}.replaced")
    if replaced.exists():
        # Of a build that was killed between the renames, or while it removed the old bundle.
        shutil.rmtree(replaced)
    if directory.exists():
        directory.rename(replaced)
    partial.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def _validated(
    where: Path,
    final: Path,
    manifest: Manifest,
    original: Original,
    options: BuildOptions,
    progress: Progress,
    cost: BuildCost | None,
) -> Report:
    policy = policy_of(manifest, options)
    validation = validate(
        where,
        manifest,
        original.checkpoint,
        original.architecture_for(manifest.target),
        original.tokenizer,
        evaluation_documents(
            options.evaluation, original.tokenizer, manifest.calibration.own if manifest.calibration else ()
        ),
        plan=options.validation,
        policy=policy.gates,
        threads=options.threads,
        bundle_threads=threads_of(manifest, options),
        scratch=where,
        progress=progress,
        tasks=options.tasks,
    )
    report = assemble(
        manifest, validation, policy, name=final.name, directory=where, command=options.command, build=cost
    )
    write_report(report, where)
    return report


def _work_directory(
    original: Original,
    recipe: Recipe,
    calibration: CalibrationSet | None,
    memory: MemoryPlan,
    options: BuildOptions,
    parent: Path,
    progress: Progress,
) -> WorkDirectory:
    """The directory of this very job: everything that its bytes depend on is part of its name and its record."""
    job = {
        "glmexport": __version__,
        "checkpoint": original.checkpoint.digest(progress),
        "recipe": recipe.digest(),
        "calibration": calibration.digest() if calibration else None,
        # These decide the order in which numbers are added up.
        "threads": options.threads,
        "device": device_name(options.device),
        "batch": [memory.batch_tokens, memory.chunk_weights],
    }
    return WorkDirectory.for_job(parent, job)


def command_line() -> str:
    """How this process was called, for the report."""
    return " ".join(["glmexport", *sys.argv[1:]])
