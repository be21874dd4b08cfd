"""A bundle compared with the original that it was built from: cheap checks first, then every byte."""

from __future__ import annotations

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import REPORTS, Source
from glmexport.foundation.errors import BundleError
from glmexport.foundation.progress import Progress
from glmexport.release.opening import NOBODY, Trust, check_bundle
from glmexport.validation.capture import CapturedReference
from glmexport.workflows.original import Original
from glmexport.workflows.provenance import source_of


def refuse_other_model(bundle: Bundle, original: Original) -> None:
    """Refuse a bundle whose manifest describes an original of another size or family; no file is hashed.

    Other checks that hash nothing belong between this and ``check_original``.

    Raises:
        BundleError: the bundle was surely made from another checkpoint.
    """
    source, given = bundle.manifest.source, original.checkpoint
    said = (source.model_type, source.parameters, source.adapter is not None)
    if said != (given.model_type, given.parameters, given.adapter is not None):
        adapter = "with" if given.adapter else "without"
        raise BundleError(
            f"{bundle.directory} was built from {source.title} ({source.model_type}, {source.parameters:,} "
            f"parameters), not from {given.name} ({given.model_type}, {given.parameters:,} parameters) {adapter} an "
            "adapter.",
            next_step=_against(source),
        )


def check_original(bundle: Bundle, original: Original, progress: Progress, trust: Trust = NOBODY) -> None:
    """Compare the files of ``bundle`` and its original with the manifest: both are read in whole.

    The bundle's report may be another one than was signed, as validation writes it. Of an original that did not change
    since it was last read the digest is kept; where a signature is asked for, it is evidence, and every byte is read.

    Raises:
        UnverifiedError: the bundle is not what was signed, or nobody of ``trust`` signed it.
        BundleError: the bundle was made from another checkpoint, or its files are not those of its manifest.
        CheckpointError: the checkpoint changed meanwhile.
        MachineError: a file cannot be read.
    """
    check_bundle(bundle, trust, progress, rewritten=REPORTS)
    if trust.given:
        original.checkpoint.forget_digest()
    _require_source(bundle, source_of(original, progress), _against(bundle.manifest.source))


def check_captured(bundle: Bundle, captured: CapturedReference, progress: Progress, trust: Trust = NOBODY) -> None:
    """Compare the files of ``bundle`` with its manifest, and the captured original with the one it names.

    Raises:
        UnverifiedError: it is not what was signed, or nobody of ``trust`` signed it.
        BundleError: the reference is of another checkpoint, or the bundle's files are not those of its manifest.
    """
    _require_source(bundle, captured.capture.source, "Give the reference of that checkpoint.")
    check_bundle(bundle, trust, progress, rewritten=REPORTS)


def _against(source: Source) -> str:
    step = "Give the checkpoint that it was built from with --against"
    return step + (", and its adapter with --adapter." if source.adapter else " alone.")


def _require_source(bundle: Bundle, given: Source, next_step: str) -> None:
    source = bundle.manifest.source
    if given.digest != source.digest:
        raise BundleError(
            f"{bundle.directory} was built from {source.title} ({source.digest[:19]}...), "
            f"not from {given.title} ({given.digest[:19]}...).",
            next_step=next_step,
        )
