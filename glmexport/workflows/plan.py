"""The text that a validation of a bundle would need, and the time that it would take, before it is started."""

from __future__ import annotations

from glmexport.bundle.bundle import Bundle
from glmexport.calibration.corpus import evaluation_documents
from glmexport.engine.scoring import ScoringSession
from glmexport.engine.session import require_provider
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Progress
from glmexport.reference.arithmetic import computing
from glmexport.reference.reference import Reference
from glmexport.report.document import JSON_NAME, Report, read_report
from glmexport.validation.capture import CapturedReference
from glmexport.validation.looks import plan_looks, planned_looks
from glmexport.validation.planning import Plan, measure_rates, plan_validation
from glmexport.validation.texts import EvaluationSet
from glmexport.workflows.matching import check_captured, check_original, refuse_other_model
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions


def plan_bundle(
    bundle: Bundle, original: Original | CapturedReference, options: BuildOptions, progress: Progress
) -> Plan:
    """Plan a validation from how far documents differ in the bundle's own report, and a few of them timed here.

    Raises:
        BundleError: the bundle was made from another checkpoint, or its report cannot be read.
        InputError: its report is of another bundle, so that nothing says how far documents differ.
    """
    if isinstance(original, Original):
        refuse_other_model(bundle, original)
        documents = evaluation_documents(options.evaluation, original.tokenizer, bundle.manifest.own_text)
        evaluation = EvaluationSet(documents, original.tokenizer)
        texts = evaluation.texts(original.architecture_for(bundle.target).context_length, options.validation)
        _own_report(bundle)
        check_original(bundle, original, progress, options.trust)
        reference = Reference(original.checkpoint, original.architecture)
    else:
        check_captured(bundle, original, progress, options.trust)
        texts, reference = list(original.texts), None
    report = _own_report(bundle)
    with progress.track("Timing", 1) as track:
        session = ScoringSession(bundle, options.threads_for(bundle.target))
        with computing(options.arithmetic):
            rates = measure_rates(session, texts, reference, options.threads)
        track.advance()
    policy, full_text = options.policy_for(bundle.target).gates, options.validation.full_text
    looks = {
        each.language: planned_looks(each, texts, policy.confidence)
        for each in plan_looks(texts, policy.minimum_positions, full_text=full_text)
    }
    return plan_validation(report.fidelity.languages, policy, rates, looks)


def _own_report(bundle: Bundle) -> Report:
    """Return the bundle's report, if it is of this bundle and this machine can run it."""
    require_provider(bundle.target.provider.name, bundle.target.provider.package)
    path = bundle.path(JSON_NAME)
    report = read_report(path)
    if report.subject.bundle_digest != bundle.digest:
        raise InputError(
            f"{path} is of another bundle, so that nothing says how far documents differ.",
            next_step="Run validate without --plan once; every later plan rests on what it finds.",
        )
    return report
