"""The stages in order: a checkpoint becomes a validated bundle for each target. Resumable at every block."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from glmexport import __version__
from glmexport.architecture import Architecture, Reference, describe
from glmexport.bundle import CalibrationSource, Manifest, Source, read_manifest, verify_files, write_bundle
from glmexport.calibration import (
    USER,
    CalibrationSet,
    Document,
    overlap,
    pack,
    shipped_documents,
    user_documents,
)
from glmexport.checkpoint import Checkpoint, Tokenizer
from glmexport.errors import BundleError, InputError, MachineError
from glmexport.estimate import estimate
from glmexport.progress import Progress
from glmexport.quantization import MemoryPlan, Walk, WorkDirectory, plan_memory
from glmexport.quantization.weights import Weights
from glmexport.recipe import Recipe, open_recipe
from glmexport.report.assemble import BuildCost, assemble
from glmexport.report.document import Report
from glmexport.report.write import write_report
from glmexport.target import Target
from glmexport.validation.machine import peak_memory
from glmexport.validation.run import ValidationPlan, validate


@dataclass(frozen=True)
class Original:
    """An opened checkpoint, what it describes, its tokenizer, and the tensors that are left out and why."""

    checkpoint: Checkpoint
    architecture: Architecture
    tokenizer: Tokenizer
    unused: dict[str, str]

    @classmethod
    def open(cls, source: str, progress: Progress) -> Original:
        """Open and check; no weight is read."""
        checkpoint = Checkpoint.open(source, progress)
        architecture = describe(checkpoint)
        unused = dict(architecture.account(checkpoint))
        tokenizer = Tokenizer.open(checkpoint.path)
        if tokenizer.vocabulary_size > architecture.vocabulary_size:
            raise InputError(
                f"{checkpoint.name}: the tokenizer has {tokenizer.vocabulary_size} tokens and the model "
                f"{architecture.vocabulary_size}.",
                next_step="Use the tokenizer files that belong to these weights.",
            )
        return cls(checkpoint, architecture, tokenizer, unused)


@dataclass(frozen=True)
class Job:
    """One target of a build."""

    target: Target
    recipe: Recipe
    directory: Path


@dataclass(frozen=True)
class BuildOptions:
    """What a build is free to choose."""

    threads: int
    max_memory_bytes: int | None = None
    calibration: tuple[Path, ...] = ()
    force: bool = False
    command: str = ""
    validation: ValidationPlan = field(default_factory=ValidationPlan)


@dataclass(frozen=True)
class Built:
    """A bundle in its place, and its report."""

    directory: Path
    manifest: Manifest
    report: Report


def jobs_of(original: Original, targets: Sequence[Target], recipe: str | None, output: Path | None) -> list[Job]:
    """One job a target: its recipe (the target's default, if none is named) and the directory it ends in."""
    jobs = []
    name = original.checkpoint.name.replace("/", "--")
    for target in targets:
        chosen = open_recipe(recipe or target.weights.default_recipe)
        own = Path("bundles") / f"{name}-{chosen.name}-{target.name}"
        jobs.append(
            Job(
                target,
                chosen,
                own if output is None else output if len(targets) == 1 else output / target.name,
            )
        )
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"Two targets are called {twice!r}.", next_step="Name it once, or rename one of the files.")
    return jobs


def build(original: Original, jobs: Sequence[Job], options: BuildOptions, progress: Progress) -> list[Built]:
    """Build, validate and put in place every job's bundle. Jobs of one recipe share one quantization.

    Raises:
        InputError: an output exists and ``force`` is off, or the calibration text is too small.
        MachineError: disk or memory do not suffice; nothing is started then.
    """
    torch.set_num_threads(options.threads)
    for job in jobs:
        _refuse_existing(job.directory, options.force)
    prepared = []
    for recipe in {job.recipe.digest(): job.recipe for job in jobs}.values():
        same = [job for job in jobs if job.recipe.digest() == recipe.digest()]
        memory = plan_memory(original.architecture, recipe, options.max_memory_bytes)
        documents = _calibration_documents(original, recipe, options)
        calibration = (
            pack(documents, original.tokenizer, recipe.calibration, original.architecture.context_length)
            if recipe.calibration
            else None
        )
        prepared.append((recipe, same, memory, documents, calibration))
    for recipe, same, *_ in prepared:
        _require_space(original, recipe, same[0].directory.parent)
    built = []
    works: list[WorkDirectory] = []
    for recipe, same, memory, documents, calibration in prepared:
        work = _work_directory(original, recipe, calibration, memory, options, same[0].directory.parent, progress)
        works.append(work)
        walk = Walk(original.checkpoint, original.architecture, recipe, calibration, work, memory, progress)
        walk.run()
        for job in same:
            built.append(_finish(original, job, walk, calibration, documents, options, progress))
    for work in works:
        shutil.rmtree(work.path)
    return built


def validate_bundle(directory: Path, original: Original, options: BuildOptions, progress: Progress) -> Built:
    """Validate a bundle against ``original`` on this machine, and write the report into it.

    Raises:
        BundleError: the bundle was made from another checkpoint, or its files are not those of its manifest.
    """
    manifest = read_manifest(directory)
    verify_files(directory, manifest)
    digest = original.checkpoint.digest(progress)
    if digest != manifest.source.digest:
        raise BundleError(
            f"{directory} was built from {manifest.source.name} ({manifest.source.digest[:19]}...), "
            f"not from {original.checkpoint.name} ({digest[:19]}...).",
            next_step="Give the checkpoint that it was built from with --against.",
        )
    report = _validated(directory, directory, manifest, original, options, progress, None)
    return Built(directory, manifest, report)


def _finish(
    original: Original,
    job: Job,
    walk: Walk,
    calibration: CalibrationSet | None,
    documents: Sequence[Document],
    options: BuildOptions,
    progress: Progress,
) -> Built:
    """Write the bundle beside its place, validate it there, and rename it; whatever fails leaves nothing behind."""
    partial = job.directory.with_name(f".{job.directory.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    try:
        manifest = _write(partial, original, job, walk, calibration, documents, progress)
        cost = BuildCost(walk.records()[1], peak_memory())
        report = _validated(partial, job.directory, manifest, original, options, progress, cost)
        _refuse_existing(job.directory, options.force)
        _put_in_place(partial, job.directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Built(job.directory, manifest, report)


def _write(
    directory: Path,
    original: Original,
    job: Job,
    walk: Walk,
    calibration: CalibrationSet | None,
    documents: Sequence[Document],
    progress: Progress,
) -> Manifest:
    architecture = original.architecture
    return write_bundle(
        directory,
        architecture,
        Weights(original.checkpoint, architecture, walk.work, walk.steps),
        Reference(original.checkpoint, architecture).rotary_tables(architecture.context_length),
        recipe=job.recipe,
        target=job.target,
        source=source_of(original, progress),
        calibration=calibration_source(calibration, documents),
        records=walk.records()[0],
        tokenizer_files=original.tokenizer.files,
        progress=progress,
    )


def _put_in_place(partial: Path, directory: Path) -> None:
    """Rename; what was there before is removed only after the new bundle has its place."""
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
    validation = validate(
        where,
        manifest,
        original.checkpoint,
        original.architecture,
        original.tokenizer,
        shipped_documents("evaluation"),
        plan=options.validation,
        threads=options.threads,
        scratch=where,
        progress=progress,
    )
    report = assemble(manifest, validation, name=final.name, directory=where, command=options.command, build=cost)
    write_report(report, where)
    return report


def _calibration_documents(original: Original, recipe: Recipe, options: BuildOptions) -> list[Document]:
    if recipe.calibration is None:
        if options.calibration:
            raise InputError(
                f"The recipe {recipe.name} uses no calibration text, but --calibration gives some.",
                next_step="Leave --calibration out, or take a recipe that calibrates.",
            )
        return []
    own = user_documents(options.calibration, original.tokenizer)
    return [*shipped_documents("calibration", set(recipe.calibration.quota) - {USER}), *own]


def source_of(original: Original, progress: Progress) -> Source:
    """What the manifest says of the original."""
    checkpoint = original.checkpoint
    return Source(
        name=checkpoint.name,
        digest=checkpoint.digest(progress),
        model_type=checkpoint.model_type,
        parameters=checkpoint.parameters,
        bytes=checkpoint.bytes,
        unused=original.unused,
    )


def calibration_source(calibration: CalibrationSet | None, documents: Sequence[Document]) -> CalibrationSource | None:
    """What the manifest says of the calibration, with its overlap with the evaluation text, measured."""
    if calibration is None:
        return None
    evaluation = shipped_documents("evaluation")
    shared = overlap(documents, evaluation)
    return CalibrationSource(
        digest=calibration.digest(),
        tokens=calibration.tokens,
        sequences=len(calibration.languages),
        tokens_per_language=calibration.tokens_per_language,
        documents=len(documents),
        evaluation_documents=len(evaluation),
        shared_documents=shared.shared_documents,
        shared_lines=shared.shared_lines,
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
        # Both decide the order in which numbers are added up.
        "threads": options.threads,
        "batch": [memory.batch_tokens, memory.chunk_weights],
    }
    return WorkDirectory.for_job(parent, job)


def _refuse_existing(directory: Path, force: bool) -> None:
    if directory.exists() and not force:
        raise InputError(
            f"{directory} exists.", next_step="Choose another directory with -o, or replace it with --force."
        )
    if directory.exists() and not (
        directory.is_dir() and ((directory / "bundle.json").is_file() or not any(directory.iterdir()))
    ):
        raise InputError(
            f"{directory} exists and is not a bundle, so --force does not replace it.",
            next_step="Choose another directory with -o.",
        )


def _require_space(original: Original, recipe: Recipe, parent: Path) -> None:
    """The bundle, the committed blocks, and two blocks' activations must fit beside each other."""
    architecture = original.architecture
    tokens = recipe.calibration.tokens if recipe.calibration else 0
    needed = 2 * estimate(architecture, recipe, 1.0, None).bundle_bytes + 2 * tokens * architecture.hidden_size * 4
    try:
        # Nothing is made before it is known to fit.
        absolute = parent.absolute()
        free = shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free
        if free >= needed:
            parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(
            f"{parent} cannot be written: {error.strerror}.", next_step="Choose another directory with -o."
        ) from error
    if free < needed:
        raise MachineError(
            f"The build needs {needed / 2**30:.1f} GiB of disk in {parent}, and {free / 2**30:.1f} GiB are free.",
            next_step="Free space, or choose another directory with -o.",
        )


def command_line() -> str:
    """How this process was called, for the report."""
    return " ".join(["glmexport", *sys.argv[1:]])
