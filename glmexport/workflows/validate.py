"""A bundle compared with its original: first the checks that can refuse, then every measurement, then the report."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from glmexport import __version__
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.fit import require_memory
from glmexport.calibration.corpus import Document, evaluation_documents
from glmexport.engine.session import require_provider
from glmexport.foundation.disk import require_writable
from glmexport.foundation.machine import library_versions
from glmexport.foundation.progress import Progress
from glmexport.foundation.target import Policy, Target
from glmexport.quantization.ranks import ALONE, Ranks
from glmexport.reference.arithmetic import computing
from glmexport.reference.reference import CPU, Reference
from glmexport.release.opening import NOBODY, Trust
from glmexport.report.document import Report
from glmexport.report.write import write_report
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic
from glmexport.validation.behaviour.plane import task_questions
from glmexport.validation.behaviour.tasks import Task
from glmexport.validation.capture import CapturedReference
from glmexport.validation.conditions import Conditions, ValidationPlan
from glmexport.validation.pieces import UNKEPT, Pieces
from glmexport.validation.run import validate, validate_captured
from glmexport.validation.texts import EvaluationSet
from glmexport.workflows.assemble_report import BuildCost, assemble
from glmexport.workflows.matching import check_captured, check_original, refuse_other_model
from glmexport.workflows.original import Original


@dataclass(frozen=True)
class BuildOptions:
    """The choices that a build or a validation leaves to its caller."""

    threads: int
    max_memory_bytes: int | None = None
    calibration: tuple[Path, ...] = ()
    #: Text files of the user's to judge on as well.
    evaluation: tuple[Path, ...] = ()
    #: The device to quantize on.
    device: torch.device = CPU
    force: bool = False
    command: str = ""
    validation: ValidationPlan = field(default_factory=ValidationPlan)
    #: The gates that a bundle has to keep; None: those of its target.
    policy: Policy | None = None
    #: Tasks of the user's, asked with the other free answers.
    tasks: tuple[Task, ...] = ()
    #: Threads of the bundle's sessions; None: those of its target, or else ``threads``.
    bundle_threads: int | None = None
    #: The processes that quantize and validate together.
    ranks: Ranks = ALONE
    #: The signers of whom one must have signed a bundle that is validated.
    trust: Trust = NOBODY
    #: The way in which the processor computes products of fp32 matrices, for the original and for quantization.
    arithmetic: OriginalArithmetic = UNCHECKED

    def threads_for(self, target: Target) -> int:
        """Return the threads that a bundle for ``target`` runs in."""
        return self.bundle_threads or target.session.threads or self.threads

    def policy_for(self, target: Target) -> Policy:
        """Return the gates that a bundle for ``target`` has to keep."""
        return self.policy or Policy(f"target {target.name}", target.gates)


@dataclass(frozen=True)
class Built(Bundle):
    """A bundle in its place, and its report."""

    report: Report


def validate_bundle(bundle: Bundle, original: Original, options: BuildOptions, progress: Progress) -> Built:
    """Validate a bundle against ``original`` on this machine, and write the report into it.

    Raises:
        BundleError: the bundle was made from another checkpoint, or its files are not those of its manifest.
    """
    refuse_other_model(bundle, original)
    require_provider(bundle.target.provider.name, bundle.target.provider.package)
    require_memory(bundle)
    evaluation = evaluation_documents(options.evaluation, original.tokenizer, bundle.manifest.own_text)
    refuse_tasks(original, bundle.target, options)
    require_writable(bundle.directory)
    check_original(bundle, original, progress, options.trust)
    report = measure_and_report(bundle, bundle.name, original, evaluation, options, progress)
    assert report is not None, "one process alone is the first rank"
    return Built(bundle.directory, bundle.manifest, report)


def validate_captured_bundle(
    bundle: Bundle, captured: CapturedReference, options: BuildOptions, progress: Progress
) -> Built:
    """Validate a bundle against the captured answers of its original, and write the report into it.

    Raises:
        BundleError: the reference is of another checkpoint, or the bundle's files are not those of its manifest.
    """
    require_provider(bundle.target.provider.name, bundle.target.provider.package)
    require_memory(bundle)
    require_writable(bundle.directory)
    check_captured(bundle, captured, progress, options.trust)
    policy, threads = options.policy_for(bundle.target), options.threads_for(bundle.target)
    torch.set_num_threads(options.threads)
    # Only the bundle is run.
    conditions = Conditions(options.validation, policy.gates, threads, threads, progress)
    validation = validate_captured(bundle, captured, conditions)
    report = assemble(bundle, validation, policy, name=bundle.name, command=options.command, build=None)
    write_report(report, bundle.directory)
    return Built(bundle.directory, bundle.manifest, report)


def measure_and_report(
    bundle: Bundle,
    name: str,
    original: Original,
    documents: Sequence[Document],
    options: BuildOptions,
    progress: Progress,
    cost: BuildCost | None = None,
    work: Path | None = None,
) -> Report | None:
    """Measure a bundle that is known to be the original's, and write its report into its directory.

    The ranks of a build measure together, and the first writes the report and returns it.

    Args:
        bundle: the bundle, which a build has not put in its place yet.
        name: its name in that place.
        original: its original.
        documents: the text that both are asked about.
        options: the choices of the caller.
        progress: the observer of the steps.
        cost: the cost of the build; None where that was some other time.
        work: the directory in which the finished pieces are kept, and all else that is needed meanwhile; None: nothing
            is kept, and what is needed is in the bundle's directory.
    """
    policy = options.policy_for(bundle.target)
    threads = options.threads_for(bundle.target)
    conditions = Conditions(
        options.validation, policy.gates, options.threads, threads, progress, options.arithmetic
    )
    reference = Reference(original.checkpoint, original.architecture_for(bundle.target))
    evaluation = EvaluationSet(documents, original.tokenizer, options.tasks)
    pieces = UNKEPT
    if work is not None:
        pieces = Pieces(work / "validation", _job(bundle, original, options, progress), options.ranks.on(CPU))
    with computing(options.arithmetic):
        validation = validate(bundle, reference, evaluation, conditions, work or bundle.directory, pieces)
    if validation is None:
        return None
    original.checkpoint.refuse_changes()
    report = assemble(bundle, validation, policy, name=name, command=options.command, build=cost)
    write_report(report, bundle.directory)
    return report


def _job(bundle: Bundle, original: Original, options: BuildOptions, progress: Progress) -> dict[str, Any]:
    """Return what every finished piece of a validation depends on."""
    return {
        "glmexport": __version__,
        "checkpoint": original.checkpoint.digest(progress),
        "bundle": bundle.digest,
        "threads": [options.threads, options.threads_for(bundle.target)],
        "arithmetic": options.arithmetic.route,
        "versions": library_versions(),
    }


def facts_of(options: BuildOptions, documents: Sequence[Document]) -> dict[str, str]:
    """Return what has to be the same for all ranks that validate together, by names for people."""
    text = [[document.id, document.language, document.text] for document in documents]
    return {
        "evaluation text": _digest(text),
        "digest of the tasks": _digest([task.model_dump() for task in options.tasks]),
        "digest of the gates": _digest(options.policy and options.policy.gates.model_dump(mode="json")),
        "amount of validation": str(options.validation),
        "threads of the bundle": str(options.bundle_threads),
    }


def refuse_tasks(original: Original, target: Target, options: BuildOptions) -> None:
    """Refuse tasks of the user's that the model cannot be asked, before anything takes long."""
    context = original.architecture_for(target).context_length
    if options.validation.behaviour:
        task_questions(options.tasks, original.tokenizer, options.validation.behaviour, context)


def _digest(value: object) -> str:
    """Return the SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def command_line() -> str:
    """Return how this process was called, for the report."""
    return " ".join(["glmexport", *sys.argv[1:]])
