"""A bundle and the original that it was built from: what is cheap to compare first, then every byte."""

from __future__ import annotations

from pathlib import Path

from glmexport.bundle.manifest import REPORTS, Manifest, Source, read_manifest, verify_files
from glmexport.foundation.errors import BundleError
from glmexport.foundation.files import sha256
from glmexport.foundation.progress import Progress
from glmexport.release.opening import NOBODY, Trust, check_bundle
from glmexport.validation.capture import CapturedReference
from glmexport.workflows.original import Original
from glmexport.workflows.provenance import source_of


def announced_bundle(directory: Path, original: Original) -> Manifest:
    """The manifest of a bundle, whose original is as large as ``original`` and of its family; no file is hashed.

    What can refuse without hashing belongs between this and ``require_bundle``.

    Raises:
        BundleError: the bundle was surely made from another checkpoint, or its manifest cannot be read.
    """
    manifest = read_manifest(directory)
    source, given = manifest.source, original.checkpoint
    said = (source.model_type, source.parameters, source.adapter is not None)
    if said != (given.model_type, given.parameters, given.adapter is not None):
        adapter = "with" if given.adapter else "without"
        raise BundleError(
            f"{directory} was built from {source.title} ({source.model_type}, {source.parameters:,} parameters), not "
            f"from {given.name} ({given.model_type}, {given.parameters:,} parameters) {adapter} an adapter.",
            next_step=_against(manifest),
        )
    return manifest


def require_bundle(
    directory: Path, manifest: Manifest, original: Original, progress: Progress, trust: Trust = NOBODY
) -> None:
    """Check the files of a bundle and its original against its ``manifest``: both are read in whole.

    The bundle's report may be another one than was signed, as it is what validation writes.

    Raises:
        UnverifiedError: the bundle is not what was signed, or nobody of ``trust`` signed it.
        BundleError: the bundle was made from another checkpoint, or its files are not those of its manifest.
        CheckpointError: the checkpoint changed meanwhile.
    """
    check_bundle(directory, manifest, trust, progress, rewritten=REPORTS)
    _require_source(directory, manifest, source_of(original, progress), _against(manifest))


def require_file(directory: Path, manifest: Manifest, name: str) -> None:
    """Check one file of a bundle, for what has to be known of it before all of them are read.

    Raises:
        BundleError: it is not the one that the manifest lists.
    """
    listed = {entry.path: entry for entry in manifest.files}
    path = directory / name
    if name not in listed or not path.is_file() or sha256(path) != listed[name].sha256:
        # Which of the two it is, and what to do about it, is for the check of all files to say.
        verify_files(directory, manifest)
        raise BundleError(
            f"{path} is not in the bundle's manifest.", next_step="Copy the bundle again, or build it again."
        )


def open_captured_bundle(
    directory: Path, captured: CapturedReference, progress: Progress, trust: Trust = NOBODY
) -> Manifest:
    """The manifest of a bundle whose original was captured, after its files have been checked against it.

    Raises:
        UnverifiedError: it is not what was signed, or nobody of ``trust`` signed it.
        BundleError: the reference is of another checkpoint, or the bundle's files are not those of its manifest.
    """
    manifest = read_manifest(directory)
    _require_source(directory, manifest, captured.capture.source, "Give the reference of that checkpoint.")
    check_bundle(directory, manifest, trust, progress, rewritten=REPORTS)
    return manifest


def _against(manifest: Manifest) -> str:
    step = "Give the checkpoint that it was built from with --against"
    return step + (", and its adapter with --adapter." if manifest.source.adapter else " alone.")


def _require_source(directory: Path, manifest: Manifest, given: Source, next_step: str) -> None:
    if given.digest != manifest.source.digest:
        raise BundleError(
            f"{directory} was built from {manifest.source.title} ({manifest.source.digest[:19]}...), "
            f"not from {given.title} ({given.digest[:19]}...).",
            next_step=next_step,
        )
