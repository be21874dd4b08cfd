"""The original is asked once: every bundle of it can be validated against the directory of its answers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from glmexport import __version__
from glmexport.bundle.bundle import Bundle
from glmexport.calibration.corpus import evaluation_documents
from glmexport.engine.session import require_provider
from glmexport.foundation.disk import require_free
from glmexport.foundation.progress import Progress
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.arithmetic import computing
from glmexport.reference.reference import Reference
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic
from glmexport.validation.behaviour.plane import BundleSessions, ask_original, questions_for
from glmexport.validation.capture import REFERENCE, TOP_K, Capture, CapturedAnswer, OriginalFacts, write_capture
from glmexport.validation.conditions import ValidationPlan
from glmexport.validation.fidelity import Streamed
from glmexport.validation.looks import first_texts
from glmexport.validation.noise import repeated_states, text_batches
from glmexport.validation.prompts import golden_prompts
from glmexport.validation.texts import EvaluationSet, text_digest
from glmexport.validation.whole_model import check_reference
from glmexport.workflows.checks import refuse_existing
from glmexport.workflows.matching import check_original, refuse_other_model
from glmexport.workflows.original import Original
from glmexport.workflows.output import partial_of, put_in_place
from glmexport.workflows.provenance import source_of

_KIND = "a captured reference"


@dataclass(frozen=True)
class CaptureOptions:
    """The choices that a capture leaves to its caller."""

    threads: int
    plan: ValidationPlan
    top_k: int = TOP_K
    force: bool = False
    #: A bundle of the same checkpoint that drafts the free answers; without one none are kept.
    draft: Bundle | None = None
    #: Text files of the user's to ask about as well.
    evaluation: tuple[Path, ...] = ()
    #: The way in which products of fp32 matrices are computed.
    arithmetic: OriginalArithmetic = UNCHECKED


def capture_reference(original: Original, output: Path, options: CaptureOptions, progress: Progress) -> Capture:
    """Ask ``original`` about the shipped evaluation text, one block in memory at a time, and keep its answers.

    Finished blocks are kept until the capture is done; the same call goes on after the last one.

    Raises:
        InputError: ``output`` exists and may not be replaced.
        BundleError: the draft is a bundle of another checkpoint.
        MachineError: the disk has too little space, or another process captures the same.
    """
    refuse_existing(output, options.force, REFERENCE, _KIND)
    if draft := options.draft:
        refuse_other_model(draft, original)
        require_provider(draft.target.provider.name, draft.target.provider.package)
    torch.set_num_threads(options.threads)
    evaluation = EvaluationSet(evaluation_documents(options.evaluation, original.tokenizer), original.tokenizer)
    texts = evaluation.texts(original.architecture.context_length, options.plan)
    sample = first_texts(texts, 1)
    rows, again = (sum(len(text.ids) for text in each) for each in (texts, [texts[index] for index in sample]))
    size = original.architecture.hidden_size
    kept = min(options.top_k, original.architecture.vocabulary_size)
    # The states of both runs, those of the last block and of the one before; the answers.
    require_free(output.parent, (rows + again) * 3 * size * 4 + rows * kept * 8, "The capture")
    # Every other check comes before this, which reads files for minutes.
    if draft:
        check_original(draft, original, progress)
    progress.remark(f"{original.checkpoint.name} is {original.checkpoint.digest(progress)}.")
    job = {
        "glmexport": __version__,
        "reference of": original.checkpoint.digest(progress),
        "texts": text_digest(texts),
        "threads": options.threads,
        "arithmetic": options.arithmetic.route,
    }
    work = WorkDirectory.for_job(output.parent, job)
    partial = partial_of(output)
    with work.locked(), computing(options.arithmetic):
        reference = Reference(original.checkpoint, original.architecture)
        batches = text_batches(texts, sample, routed=bool(original.architecture.routed))
        runs = repeated_states(reference, texts, batches, options.threads, work.path, progress, kept=work)
        states = runs.states
        check = check_reference(reference, texts, work.path, options.plan.max_memory_bytes, progress, states)
        facts = OriginalFacts(
            source=source_of(original, progress),
            noise=runs.noise(progress),
            reference_check=check,
            arithmetic=options.arithmetic,
            answers=_answers(evaluation, reference, options, work.path, progress),
            prompts=golden_prompts(original.checkpoint, evaluation),
        )
        if partial.exists():
            shutil.rmtree(partial)
        try:
            captured = write_capture(partial, Streamed(states, reference), facts, progress, top_k=options.top_k)
            original.checkpoint.refuse_changes()
            refuse_existing(output, options.force, REFERENCE, _KIND)
            put_in_place(partial, output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    shutil.rmtree(work.path)
    return captured


def _answers(
    evaluation: EvaluationSet, reference: Reference, options: CaptureOptions, scratch: Path, progress: Progress
) -> tuple[CapturedAnswer, ...] | None:
    """Return the original's own answers; only the number of passes depends on the bundle that drafts them."""
    plan = options.plan.behaviour
    if options.draft is None or plan is None:
        return None
    sessions = BundleSessions.for_bundle(options.draft, options.threads)
    asked = questions_for(evaluation.documents, evaluation.tokenizer, plan, sessions.context_length)
    answers = ask_original(asked, sessions, reference, plan=plan, scratch=scratch, progress=progress)
    return tuple(
        CapturedAnswer(question=question, tokens=tuple(tokens))
        for question, tokens in zip(asked, answers, strict=True)
    )
