"""The stages of a build in order: a checkpoint becomes a validated bundle for each target, resumable at every block."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import torch

from glmexport import __version__
from glmexport.architecture.description import Architecture
from glmexport.assembly.write import BundleContents, write_bundle
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.fit import lacking_memory
from glmexport.bundle.manifest import LargestActivation
from glmexport.calibration.corpus import Document, evaluation_documents
from glmexport.foundation.machine import library_versions, peak_memory
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Recipe
from glmexport.quantization.job import QuantizationJob
from glmexport.quantization.memory import MemoryPlan
from glmexport.quantization.quantized_model import QuantizedModel
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.walk import Walk, walk
from glmexport.quantization.weights import Weights
from glmexport.reference.arithmetic import computing
from glmexport.reference.reference import Reference
from glmexport.report.document import Report
from glmexport.validation.texts import EvaluationSet
from glmexport.validation.unrun import Unrun, validate_unrun
from glmexport.workflows.assemble_report import BuildCost
from glmexport.workflows.calibration_text import CalibrationText, cache_text, read_calibration_text
from glmexport.workflows.checks import refuse_existing, refuse_formats, require_space
from glmexport.workflows.device import (
    arithmetic_for,
    arithmetic_on,
    device_name,
    peak_device_memory,
    plan_on,
    product_name,
    running_on,
)
from glmexport.workflows.job import Job
from glmexport.workflows.original import Original
from glmexport.workflows.output import partial_of, put_in_place
from glmexport.workflows.provenance import calibration_source, own_fingerprints, source_of
from glmexport.workflows.ranks import opened_by_all, ranks_here, refuse_differences, require_shared
from glmexport.workflows.validate import BuildOptions, Built, facts_of, measure_and_report, refuse_tasks


@dataclass(frozen=True)
class BuiltUnrun(Bundle):
    """A bundle in its place that this machine cannot run, and the gates that need no run."""

    unrun: Unrun


def build(
    original: Original, jobs: Sequence[Job], options: BuildOptions, progress: Progress
) -> list[Built | BuiltUnrun]:
    """Build, validate and put in place every job's bundle. Jobs of one recipe share one quantization.

    A bundle whose execution provider is not on this machine is written all the same, and not run. Ranks quantize and
    validate together; rank 0 writes, puts in place and returns what they have built.

    Raises:
        InputError: an output exists and ``force`` is off, or the calibration text is too small.
        MachineError: disk or memory do not suffice; nothing was started then.
    """
    torch.set_num_threads(options.threads)
    # Every other check comes before this, which reads a checkpoint for minutes.
    plans = _plan(original, jobs, options)
    if any(original.drafts(job.target) for job in jobs):
        original = original.sharing_tables()
    progress.remark(f"{original.checkpoint.name} is {original.checkpoint.digest(progress)}.")
    ranks = options.ranks
    with ExitStack() as held:
        quantizations = []
        for plan in plans:
            quantizations.append(_quantization_job(original, plan, options, progress))
            if ranks.first:
                held.enter_context(quantizations[-1].work.locked())
            require_shared(ranks, quantizations[-1].work.path)
        held.enter_context(computing(options.arithmetic))
        built: list[Built | BuiltUnrun] = []
        try:
            for plan, quantization in zip(plans, quantizations, strict=True):
                model = _quantized(quantization) if ranks.first else None
                if model is None:
                    _take_part(quantization)
                for job in plan.jobs:
                    if model:
                        _write(original, job, model, quantization, plan.text, progress)
                    written = opened_by_all(ranks, partial_of(job.directory))
                    validated = _validate(original, job, written, model, quantization, plan, options, progress)
                    built += [validated] if validated else []
            if not ranks.first:
                return []
            original.checkpoint.refuse_changes()
            for bundle in built:
                refuse_existing(bundle.directory, options.force)
                put_in_place(partial_of(bundle.directory), bundle.directory)
        except BaseException:
            for job in jobs if ranks.first else ():
                shutil.rmtree(partial_of(job.directory), ignore_errors=True)
            raise
        for quantization in quantizations:
            shutil.rmtree(quantization.work.path)
    return built


def quantize(original: Original, recipe: Recipe, options: BuildOptions, parent: Path, progress: Progress) -> Weights:
    """Return the weights that a bundle of ``recipe`` would have, from a work directory below ``parent`` that stays.

    Raises:
        InputError: the calibration text is too small.
        MachineError: memory does not suffice, or another process works on the same.
    """
    plan = _plan_quantization(original, recipe, options, parent)
    quantization = _quantization_job(original, plan, options, progress)
    with quantization.work.locked():
        return _quantized(quantization).weights()


@dataclass(frozen=True)
class _Plan:
    """One quantization, and the jobs that share it."""

    recipe: Recipe
    memory: MemoryPlan
    text: CalibrationText
    #: The directory that its work directory is in.
    parent: Path
    jobs: tuple[Job, ...] = ()
    #: Text that the bundles are judged on.
    evaluation: tuple[Document, ...] = ()


def _plan(original: Original, jobs: Sequence[Job], options: BuildOptions) -> list[_Plan]:
    """Plan a quantization for each recipe, and refuse whatever can be refused without reading the checkpoint."""
    for job in jobs:
        refuse_formats(original, job)
        refuse_existing(job.directory, options.force)
    plans = []
    for recipe in {job.recipe.digest(): job.recipe for job in jobs}.values():
        same = tuple(job for job in jobs if job.recipe.digest() == recipe.digest())
        plan = _plan_quantization(original, recipe, options, same[0].directory.parent)
        # Read once: a file that is changed or gone at the end is no reason to lose a build.
        calibrated = own_fingerprints(plan.text.documents)
        evaluation = evaluation_documents(options.evaluation, original.tokenizer, calibrated)
        plans.append(replace(plan, jobs=same, evaluation=tuple(evaluation)))
    for job in jobs:
        refuse_tasks(original, job.target, options)
    languages = {document.language for plan in plans for document in plan.evaluation}
    positions = len(languages) * options.validation.positions_per_language
    require_space(original, [plan.jobs for plan in plans], positions, options.ranks)
    return plans


def _plan_quantization(original: Original, recipe: Recipe, options: BuildOptions, parent: Path) -> _Plan:
    """Return what a quantization needs beside the checkpoint."""
    plan = plan_on(options.device, original.architecture, recipe, options.max_memory_bytes)
    # What is free on a device is not the same for all ranks, whose batches have to be.
    memory = MemoryPlan(**min(options.ranks.gather(asdict(plan)), key=itemgetter("batch_tokens", "chunk_weights")))
    text = read_calibration_text(original, recipe, options.calibration)
    return _Plan(recipe, memory, text, parent)


def _quantization_job(original: Original, plan: _Plan, options: BuildOptions, progress: Progress) -> QuantizationJob:
    """Open the work directory of ``plan``: everything that its bytes depend on is part of its name and its record."""
    sequences = plan.text.sequences
    architecture = _quantized_architecture(original, plan.jobs)
    arithmetic = arithmetic_for(architecture, plan.recipe, arithmetic_on(options.device, options.arithmetic))
    job = {
        "glmexport": __version__,
        "checkpoint": original.checkpoint.digest(progress),
        "recipe": plan.recipe.digest(),
        "calibration": sequences.digest() if sequences else None,
        # These decide the order in which numbers are added up.
        "threads": options.threads,
        "device": product_name(options.device),
        "arithmetic": arithmetic.label,
        "batch": [plan.memory.batch_tokens, plan.memory.chunk_weights],
    }
    refuse_differences(options.ranks, _facts(original, job) | facts_of(options, plan.evaluation))
    work = WorkDirectory.for_job(plan.parent, job, makes=options.ranks.first)
    return QuantizationJob(
        checkpoint=original.checkpoint,
        architecture=architecture,
        recipe=plan.recipe,
        calibration=sequences,
        work=work,
        memory=plan.memory,
        progress=progress,
        device=options.device,
        ranks=options.ranks,
        arithmetic=arithmetic,
    )


def _facts(original: Original, job: Mapping[str, Any]) -> dict[str, str]:
    """Return what has to be the same for all ranks, by names for people."""
    facts = {name: str(value) for name, value in job.items()}
    return facts | {f"version of {name}": version for name, version in library_versions().items()}


def _quantized_architecture(original: Original, jobs: Sequence[Job]) -> Architecture:
    """Return what all ``jobs`` together need quantized: with the layer that drafts, if any of them drafts."""
    if not jobs:
        return original.architecture
    return original.architecture_for(next((job.target for job in jobs if original.drafts(job.target)), jobs[0].target))


def _quantized(job: QuantizationJob) -> QuantizedModel:
    with running_on(job.device, job.arithmetic):
        return walk(job)


def _take_part(job: QuantizationJob) -> None:
    """Do this rank's share of what ``_quantized`` does on rank 0."""
    with running_on(job.device, job.arithmetic):
        Walk.prepare(job).take_steps()


def _write(
    original: Original,
    job: Job,
    model: QuantizedModel,
    quantization: QuantizationJob,
    text: CalibrationText,
    progress: Progress,
) -> None:
    """Write the bundle beside its place."""
    partial = partial_of(job.directory)
    if partial.exists():
        shutil.rmtree(partial)
    architecture = original.architecture_for(job.target)
    contents = BundleContents(
        architecture=architecture,
        weights=model.weights(architecture),
        rotary_tables=Reference(original.checkpoint, architecture).rotary_tables(architecture.context_length),
        recipe=job.recipe,
        target=job.target,
        source=source_of(original, progress, job.target),
        calibration=calibration_source(text.sequences, text.documents),
        records=model.records,
        allocation=model.allocation,
        draft_records=model.draft_records if original.drafts(job.target) else (),
        largest=LargestActivation(**model.largest._asdict()) if model.largest else None,
        tokenizer_files=original.tokenizer.files,
        cache_text=cache_text(text.sequences),
        arithmetic=quantization.arithmetic.label,
    )
    write_bundle(partial, contents, progress)


def _validate(
    original: Original,
    job: Job,
    bundle: Bundle,
    model: QuantizedModel | None,
    quantization: QuantizationJob,
    plan: _Plan,
    options: BuildOptions,
    progress: Progress,
) -> Built | BuiltUnrun | None:
    """Measure the bundle that was written beside its place, as far as this machine can run it; rank 0 says what is so.

    ``model`` is None on the other ranks, and so is what they return.
    """
    if not options.ranks.decide(lambda: bundle.runs_here and lacking_memory(bundle, ranks_here()) is None):
        if model is None:
            return None
        reference = Reference(original.checkpoint, original.architecture)
        evaluation = EvaluationSet(evaluation_documents((), original.tokenizer, ()), original.tokenizer)
        unrun = validate_unrun(bundle, reference, evaluation, progress, options.max_memory_bytes)
        return BuiltUnrun(job.directory, bundle.manifest, unrun)
    options = replace(options, arithmetic=arithmetic_for(original.architecture, job.recipe, options.arithmetic))
    cost = None
    if model:
        device = options.device
        cost = BuildCost(model.seconds, peak_memory(), device_name(device), peak_device_memory(device))
    report = measure_and_report(
        bundle, job.directory.name, original, plan.evaluation, options, progress, cost, quantization.work.path
    )
    # Only rank 0 has a model, and the report.
    return Built(job.directory, bundle.manifest, cast(Report, report)) if model else None
