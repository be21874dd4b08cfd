"""What a manifest says of where a bundle comes from."""

from __future__ import annotations

from collections.abc import Sequence

from glmexport.bundle.manifest import AdapterSource, CalibrationSource, Source
from glmexport.calibration.corpus import USER, Document, fingerprint, overlap, shipped_documents
from glmexport.calibration.sequences import CalibrationSet
from glmexport.foundation.progress import Progress
from glmexport.foundation.target import Target
from glmexport.workflows.original import Original


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
