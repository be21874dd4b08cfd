"""A bundle is validated on devices: the original is asked once, each runs the same job, one report has all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from glmexport import __version__
from glmexport.bundle.bundle import Bundle
from glmexport.calibration.corpus import evaluation_documents
from glmexport.devices.answers import DeviceAnswers
from glmexport.devices.fleet import Member, ask
from glmexport.devices.judging import DeviceJudge, failed, measured
from glmexport.devices.kit import write_kit
from glmexport.foundation.errors import BundleError, GlmexportError, MachineError
from glmexport.foundation.progress import Progress
from glmexport.report.write import write_report
from glmexport.results.device import DeviceResult
from glmexport.validation.capture import CapturedReference
from glmexport.validation.run import Validation
from glmexport.workflows.assemble_report import assemble_devices, detailed
from glmexport.workflows.capture import CaptureOptions, capture_reference
from glmexport.workflows.matching import check_captured, check_original, refuse_other_model
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions, Built


@dataclass(frozen=True)
class Asking:
    """The job that devices are given, and the judge of what they answer about a bundle.

    ``place`` is the directory from which a later run goes on.
    """

    judge: DeviceJudge
    options: BuildOptions
    place: Path
    job: Path


@contextmanager
def locked(bundle: Bundle) -> Iterator[None]:
    """Hold a lock, so that no other process asks devices about ``bundle`` meanwhile.

    Raises:
        MachineError: another process does.
    """
    place = _place(bundle)
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise MachineError(
            f"Another process validates {bundle.directory} on devices.",
            next_step=f"Wait for it. If there is none, remove {place / 'lock'}.",
        ) from error
    try:
        yield
    finally:
        lock.release()
        if place.is_dir() and {path.name for path in place.iterdir()} <= {"lock"}:
            shutil.rmtree(place)


def _place(bundle: Bundle) -> Path:
    directory = bundle.directory.absolute()
    return directory.with_name(f".{directory.name}.devices")


def prepare_job(
    bundle: Bundle,
    original: Original | CapturedReference,
    options: BuildOptions,
    threads: int | None,
    progress: Progress,
) -> Asking:
    """Write the job about ``bundle``; an original that is no capture yet is captured for it.

    ``threads`` is the number for each device; None: as many as it has cores.

    Raises:
        BundleError: the bundle was made from another checkpoint, or its files are not those of its manifest.
    """
    place = _place(bundle)
    if isinstance(original, Original):
        refuse_other_model(bundle, original)
        evaluation_documents(options.evaluation, original.tokenizer)
        check_original(bundle, original, progress, options.trust)
        captured = _captured(bundle, original, options, place, progress)
    else:
        check_captured(bundle, original, progress, options.trust)
        captured = original
    judge = DeviceJudge(bundle, captured, options.validation, options.policy_for(bundle.target).gates)
    folder = place / "job"
    if folder.exists():
        shutil.rmtree(folder)
    judge.write_job(folder, threads)
    return Asking(judge, options, place, folder)


def validate_on_devices(asking: Asking, members: Sequence[Member], progress: Progress) -> Built:
    """Let every device answer, judge each, and write one report into the bundle.

    Answers are kept until all devices have answered: the same call goes on with what is there.

    Raises:
        MachineError: not one device answered.
    """
    failures = ask(members, asking.job, asking.place / "results", progress)
    bundle = asking.judge.bundle
    sections: list[DeviceResult] = []
    validations: dict[str, Validation] = {}
    for member in members:
        try:
            if member.name in failures:
                raise failures[member.name]
            answers = DeviceAnswers.open(member.name, asking.job, asking.place / "results" / member.folder)
        except GlmexportError as error:
            failures[member.name] = error
            sections.append(failed(member.name, member.device_class, f"{error.message} {error.next_step}"))
            continue
        validations[member.name] = asking.judge.validation(answers)
        sections.append(measured(member.name, member.device_class, answers, validations[member.name]))
    if not validations:
        first, *others = failures.values()
        if not others:
            raise first
        raise MachineError(
            f"No device answered. {first.message} ({len(others)} more devices failed.)", next_step=first.next_step
        )
    report = assemble_devices(
        bundle,
        sections,
        validations[detailed(sections).name],
        asking.options.policy_for(bundle.target),
        command=asking.options.command,
    )
    write_report(report, bundle.directory)
    if not failures:
        shutil.rmtree(asking.place)
    return Built(bundle.directory, bundle.manifest, report)


def write_kits(asking: Asking, archives: Sequence[Path], progress: Progress) -> None:
    """Pack the job for devices that no network reaches.

    Raises:
        InputError: an archive exists.
    """
    for archive in archives:
        write_kit(asking.job, archive, progress)


def discard(asking: Asking) -> None:
    """Remove the job, where no device is going to answer it here."""
    shutil.rmtree(asking.place, ignore_errors=True)


def _captured(
    bundle: Bundle, original: Original, options: BuildOptions, place: Path, progress: Progress
) -> CapturedReference:
    """Return the original's answers, kept beside the job so that an interrupted run does not ask again."""
    facts = {
        "glmexport": __version__,
        "bundle": bundle.digest,
        "plan": repr(options.validation),
        "threads": options.threads,
        "arithmetic": options.arithmetic.route,
        "evaluation": [hashlib.sha256(path.read_bytes()).hexdigest() for path in options.evaluation],
    }
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    output = place / f"reference-{name}"
    if output.exists():
        try:
            return CapturedReference.open(output)
        except BundleError:
            shutil.rmtree(output)
    place.mkdir(parents=True, exist_ok=True)
    draft = bundle if options.validation.behaviour else None
    settings = CaptureOptions(
        options.threads,
        options.validation,
        draft=draft,
        evaluation=options.evaluation,
        arithmetic=options.arithmetic,
    )
    try:
        capture_reference(original, output, settings, progress)
    except MachineError as error:
        if draft is None or bundle.target.provider.name == "CPUExecutionProvider":
            raise
        # The bundle cannot run here, so that devices are asked.
        progress.remark(f"Free answers are not compared: {error.message} Nothing here can draft the original's.")
        capture_reference(original, output, replace(settings, draft=None), progress)
    return CapturedReference.open(output)
