"""The stages in order: a checkpoint becomes a validated bundle for each target. Resumable at every block."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from glmexport import __version__
from glmexport.architecture.description import Architecture
from glmexport.assembly.write import write_bundle
from glmexport.bundle.fit import can_run
from glmexport.bundle.manifest import LargestActivation, Manifest
from glmexport.bundle.records import QuantizedMatrix
from glmexport.calibration.corpus import Document, evaluation_documents
from glmexport.calibration.sequences import CalibrationSet, pack
from glmexport.foundation.machine import peak_memory
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Recipe
from glmexport.quantization.memory import MemoryPlan
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.walk import Walk
from glmexport.quantization.weights import Weights
from glmexport.reference.reference import Reference
from glmexport.validation.unrun import Unrun, validate_unrun
from glmexport.workflows.assemble_report import BuildCost
from glmexport.workflows.calibration_text import cache_text, calibration_context, calibration_documents
from glmexport.workflows.device import device_name, peak_device_memory, plan_on, running_on
from glmexport.workflows.job import Job, Original, refuse_existing, refuse_formats, require_space
from glmexport.workflows.output import partial_of, put_in_place
from glmexport.workflows.provenance import calibration_source, own_fingerprints, source_of
from glmexport.workflows.validate import BuildOptions, Built, refuse_tasks, validated


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
    # Nothing that can refuse comes after this, where a checkpoint is read for minutes, but what reading it finds.
    prepared = _prepared_all(original, jobs, options)
    if any(original.drafts(job.target) for job in jobs):
        original = original.sharing_tables()
    progress.remark(f"{original.checkpoint.name} is {original.checkpoint.digest(progress)}.")
    with ExitStack() as locks:
        works = []
        for part in prepared:
            parent = part.jobs[0].directory.parent
            works.append(_work_directory(original, part.recipe, part.text, part.memory, options, parent, progress))
            locks.enter_context(works[-1].locked())
        built: list[Built | BuiltUnrun] = []
        try:
            for part, work in zip(prepared, works, strict=True):
                drafting = next((job.target for job in part.jobs if original.drafts(job.target)), part.jobs[0].target)
                architecture = original.architecture_for(drafting)
                walk = _walked(original, architecture, part.recipe, part.text, work, part.memory, options, progress)
                for job in part.jobs:
                    built.append(_finish(original, job, walk, part, options, progress))
            original.checkpoint.refuse_changes()
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


@dataclass(frozen=True)
class _Prepared:
    """The jobs of one recipe, and what their walk and their validation need beside the checkpoint."""

    recipe: Recipe
    jobs: list[Job]
    memory: MemoryPlan
    documents: list[Document]
    #: None where the recipe calibrates on nothing.
    text: CalibrationSet | None
    evaluation: list[Document]


def _prepared_all(original: Original, jobs: Sequence[Job], options: BuildOptions) -> list[_Prepared]:
    """By recipe, after everything that can be refused without reading the checkpoint."""
    for job in jobs:
        refuse_formats(original, job)
        refuse_existing(job.directory, options.force)
    prepared = []
    for recipe in {job.recipe.digest(): job.recipe for job in jobs}.values():
        same = [job for job in jobs if job.recipe.digest() == recipe.digest()]
        memory, documents, text = _prepared(original, recipe, options)
        # Read once: a file that is changed or gone at the end is no reason to lose a build.
        evaluation = evaluation_documents(options.evaluation, original.tokenizer, own_fingerprints(documents))
        prepared.append(_Prepared(recipe, same, memory, documents, text, evaluation))
    for job in jobs:
        refuse_tasks(original, job.target, options)
    for part in prepared:
        require_space(original, part.jobs)
    return prepared




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












def _finish(
    original: Original, job: Job, walk: Walk, prepared: _Prepared, options: BuildOptions, progress: Progress
) -> Built | BuiltUnrun:
    """Write the bundle beside its place and validate it there, as far as this machine can."""
    partial = partial_of(job.directory)
    if partial.exists():
        shutil.rmtree(partial)
    # Read once: every committed file is hashed for it.
    records, seconds = walk.records()
    manifest = _write(partial, original, job, walk, records, prepared.text, prepared.documents, progress)
    if not can_run(manifest):
        reference = Reference(original.checkpoint, original.architecture)
        text = evaluation_documents((), original.tokenizer, ())
        limit = options.max_memory_bytes
        unrun = validate_unrun(partial, manifest, original.checkpoint, reference, text, progress, limit)
        return BuiltUnrun(job.directory, manifest, unrun)
    cost = BuildCost(seconds, peak_memory(), device_name(options.device), peak_device_memory(options.device))
    report = validated(
        partial, job.directory, manifest, original, prepared.evaluation, options, progress, cost
    )
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
    architecture, largest = original.architecture_for(job.target), walk.largest_activation()
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
        largest=LargestActivation(**largest._asdict()) if largest else None,
        tokenizer_files=original.tokenizer.files,
        cache_text=cache_text(calibration),
        progress=progress,
    )






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


