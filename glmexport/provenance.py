"""What a manifest says of where a bundle comes from, and whether an original at hand is that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glmexport.bundle import AdapterSource, CalibrationSource, Manifest, Source
from glmexport.bundle.manifest import REPORTS
from glmexport.calibration import USER, CalibrationSet, Document, fingerprint, overlap, shipped_documents
from glmexport.errors import BundleError
from glmexport.job import Original
from glmexport.progress import Progress
from glmexport.release import NOBODY, Trust, open_signed
from glmexport.target import Target
from glmexport.validation.capture import CapturedReference


def source_of(original: Original, progress: Progress, target: Target | None = None) -> Source:
    """What the manifest of a bundle for ``target`` says of the original."""
    checkpoint = original.checkpoint
    adapter = checkpoint.adapter
    return Source(
        name=checkpoint.name,
        digest=checkpoint.digest(progress),
        model_type=checkpoint.model_type,
        parameters=checkpoint.parameters,
        bytes=checkpoint.bytes,
        unused=original.unused_for(target) if target else original.unused,
        adapter=AdapterSource(name=adapter.name, digest=adapter.digest(progress)) if adapter else None,
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
        own=own_fingerprints(documents),
    )


def own_fingerprints(documents: Sequence[Document]) -> tuple[str, ...]:
    """Of the user's among calibration ``documents``: no bundle is judged on them."""
    return tuple(fingerprint(document) for document in documents if document.language == USER)


def open_bundle(directory: Path, original: Original, progress: Progress, trust: Trust = NOBODY) -> Manifest:
    """Return the manifest of a bundle, after its files and its original have been checked against it.

    Its report may be another one than was signed, as it is what validation writes.

    Raises:
        BundleError: the bundle was made from another checkpoint, or its files are not those of its manifest.
        UnverifiedError: it is not what was signed, or nobody of ``trust`` signed it.
    """
    manifest = open_signed(directory, trust, progress, rewritten=REPORTS)
    step = "Give the checkpoint that it was built from with --against"
    step += ", and its adapter with --adapter." if manifest.source.adapter else " alone."
    _require_source(directory, manifest, source_of(original, progress), step)
    return manifest


def open_captured_bundle(
    directory: Path, captured: CapturedReference, progress: Progress, trust: Trust = NOBODY
) -> Manifest:
    """Return the same where the original was captured.

    Raises:
        BundleError: the reference is of another checkpoint, or the bundle's files are not those of its manifest.
        UnverifiedError: it is not what was signed, or nobody of ``trust`` signed it.
    """
    manifest = open_signed(directory, trust, progress, rewritten=REPORTS)
    _require_source(directory, manifest, captured.capture.source, "Give the reference of that checkpoint.")
    return manifest


def _require_source(directory: Path, manifest: Manifest, given: Source, next_step: str) -> None:
    if given.digest != manifest.source.digest:
        raise BundleError(
            f"{directory} was built from {manifest.source.title} ({manifest.source.digest[:19]}...), "
            f"not from {given.title} ({given.digest[:19]}...).",
            next_step=next_step,
        )
