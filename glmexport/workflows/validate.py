"""A bundle against its original: what can refuse first, then every measurement, then the report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from glmexport.bundle.manifest import Manifest, read_manifest
from glmexport.calibration.corpus import Document, evaluation_documents
from glmexport.engine.session import require_provider
from glmexport.foundation.disk import require_writable
from glmexport.foundation.progress import Progress
from glmexport.foundation.target import Policy, Target
from glmexport.reference.reference import CPU
from glmexport.release.opening import NOBODY, Trust
from glmexport.report.document import Report
from glmexport.report.write import write_report
from glmexport.validation.behaviour.plane import task_questions
from glmexport.validation.behaviour.tasks import Task
from glmexport.validation.capture import CapturedReference
from glmexport.validation.run import ValidationPlan, validate, validate_captured
from glmexport.workflows.assemble_report import BuildCost, assemble
from glmexport.workflows.matching import announced_bundle, open_captured_bundle, require_bundle
from glmexport.workflows.original import Original


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
    #: Whose signature a bundle that is validated has to have.
    trust: Trust = NOBODY


@dataclass(frozen=True)
class Built:
    """A bundle in its place, and its report."""

    directory: Path
    manifest: Manifest
    report: Report


def refuse_tasks(original: Original, target: Target, options: BuildOptions) -> None:
    """Refuse tasks of the user's that the model cannot be asked, before anything takes long."""
    context = original.architecture_for(target).context_length
    if options.validation.behaviour:
        task_questions(options.tasks, original.tokenizer, options.validation.behaviour, context)




def validate_bundle(directory: Path, original: Original, options: BuildOptions, progress: Progress) -> Built:
    """Validate a bundle against ``original`` on this machine, and write the report into it.

    Raises:
        BundleError: the bundle was made from another checkpoint, or its files are not those of its manifest.
    """
    manifest = announced_bundle(directory, original)
    require_provider(manifest.target.provider.name, manifest.target.provider.package)
    calibrated = manifest.calibration.own if manifest.calibration else ()
    evaluation = evaluation_documents(options.evaluation, original.tokenizer, calibrated)
    refuse_tasks(original, manifest.target, options)
    require_writable(directory)
    require_bundle(directory, manifest, original, progress, options.trust)
    report = validated(directory, directory, manifest, original, evaluation, options, progress, None)
    return Built(directory, manifest, report)


def validate_captured_bundle(
    directory: Path, captured: CapturedReference, options: BuildOptions, progress: Progress
) -> Built:
    """Validate a bundle against what its original answered when it was captured, and write the report into it.

    Raises:
        BundleError: the reference is of another checkpoint, or the bundle's files are not those of its manifest.
    """
    provider = read_manifest(directory).target.provider
    require_provider(provider.name, provider.package)
    require_writable(directory)
    manifest = open_captured_bundle(directory, captured, progress, options.trust)
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


def threads_of(manifest: Manifest, options: BuildOptions) -> int:
    """Threads that the bundle runs in."""
    return options.bundle_threads or manifest.target.session.threads or options.threads


def policy_of(manifest: Manifest, options: BuildOptions) -> Policy:
    """What the bundle has to keep."""
    return options.policy or Policy(f"target {manifest.target.name}", manifest.target.gates)




def validated(
    where: Path,
    final: Path,
    manifest: Manifest,
    original: Original,
    evaluation: Sequence[Document],
    options: BuildOptions,
    progress: Progress,
    cost: BuildCost | None,
) -> Report:
    """Measure the bundle in ``where``, whose place will be ``final``, and write its report there."""
    policy = policy_of(manifest, options)
    validation = validate(
        where,
        manifest,
        original.checkpoint,
        original.architecture_for(manifest.target),
        original.tokenizer,
        evaluation,
        plan=options.validation,
        policy=policy.gates,
        threads=options.threads,
        bundle_threads=threads_of(manifest, options),
        scratch=where,
        progress=progress,
        tasks=options.tasks,
    )
    original.checkpoint.refuse_changes()
    report = assemble(
        manifest, validation, policy, name=final.name, directory=where, command=options.command, build=cost
    )
    write_report(report, where)
    return report


def command_line() -> str:
    """How this process was called, for the report."""
    return " ".join(["glmexport", *sys.argv[1:]])
