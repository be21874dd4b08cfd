"""What a validation of a bundle would need, before it is started."""

from __future__ import annotations

from pathlib import Path

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import Manifest
from glmexport.calibration.corpus import evaluation_documents
from glmexport.engine.scoring import ScoringSession
from glmexport.engine.session import require_provider
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Progress
from glmexport.reference.reference import Reference
from glmexport.report.document import JSON_NAME, Report, read_report
from glmexport.validation.capture import CapturedReference
from glmexport.validation.planning import Plan, measure_rates, plan_validation
from glmexport.validation.run import texts_for
from glmexport.workflows.job import Original
from glmexport.workflows.matching import announced_bundle, open_captured_bundle, require_bundle
from glmexport.workflows.validate import BuildOptions, policy_of, threads_of


def plan_bundle(
    directory: Path, original: Original | CapturedReference, options: BuildOptions, progress: Progress
) -> Plan:
    """From how far documents differ in the bundle's own report, and a few of them timed here.

    Raises:
        BundleError: the bundle was made from another checkpoint, or its report cannot be read.
        InputError: its report is of another bundle, so that nothing says how far documents differ.
    """
    if isinstance(original, Original):
        manifest = announced_bundle(directory, original)
        calibrated = manifest.calibration.own if manifest.calibration else ()
        documents = evaluation_documents(options.evaluation, original.tokenizer, calibrated)
        texts = texts_for(documents, original.tokenizer, original.architecture_for(manifest.target), options.validation)
        _own_report(directory, manifest)
        require_bundle(directory, manifest, original, progress, options.trust)
        reference = Reference(original.checkpoint, original.architecture)
    else:
        manifest = open_captured_bundle(directory, original, progress, options.trust)
        texts, reference = list(original.texts), None
    report = _own_report(directory, manifest)
    with progress.track("Timing", 1) as track:
        session = ScoringSession(Bundle(directory, manifest), threads_of(manifest, options))
        rates = measure_rates(session, texts, reference, options.threads)
        track.advance()
    return plan_validation(report.fidelity.languages, policy_of(manifest, options).gates, rates)


def _own_report(directory: Path, manifest: Manifest) -> Report:
    """The bundle's report, if it is of this bundle and there is what runs it."""
    require_provider(manifest.target.provider.name, manifest.target.provider.package)
    report = read_report(directory / JSON_NAME)
    if report.subject.bundle_digest != manifest.digest():
        raise InputError(
            f"{directory / JSON_NAME} is of another bundle, so that nothing says how far documents differ.",
            next_step="Run validate without --plan once; every later plan rests on what it finds.",
        )
    return report
