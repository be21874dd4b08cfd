"""A bundle compared with its original on this machine: fidelity, shares of the divergence, speed, and the gates."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import Manifest
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.progress import Progress
from glmexport.foundation.target import Gates
from glmexport.quantization.ranks import Parcel
from glmexport.reference.reference import Reference
from glmexport.results.arithmetic import OriginalArithmetic
from glmexport.results.behaviour import Behaviour
from glmexport.results.fidelity import Fidelity, Share
from glmexport.results.gate import Gate
from glmexport.results.performance import Performance
from glmexport.results.prompts import PromptParity
from glmexport.results.record import Verdict
from glmexport.results.reference import ReferenceCheck
from glmexport.results.routing import LayerRouting
from glmexport.results.weights import WeightCheck
from glmexport.validation.behaviour.plane import BundleSessions, ask, ask_bundle, questions_for
from glmexport.validation.capture import CapturedReference
from glmexport.validation.conditions import Conditions
from glmexport.validation.divergence import Divergence
from glmexport.validation.fidelity import ChosenAnswers, compare
from glmexport.validation.gates import (
    apply_gates,
    capture_gate,
    manifest_gates,
    prompt_gate,
    reference_gate,
    verdict_of,
    weight_gates,
)
from glmexport.validation.host_gates import host_gate
from glmexport.validation.looks import JudgedText, first_texts, judge_text
from glmexport.validation.performance import measure_performance
from glmexport.validation.performance_gates import performance_gates
from glmexport.validation.pieces import UNKEPT, Pieces
from glmexport.validation.prompts import golden_prompts, prompt_parity
from glmexport.validation.shared_texts import SharedTexts
from glmexport.validation.shares import bundle_answer, shares_of
from glmexport.validation.texts import EvaluationSet, EvaluationText
from glmexport.validation.weights import check_weights
from glmexport.validation.whole_model import check_reference

_IN_ONNX_RUNTIME = "Bundle in ONNX Runtime"
_CHECK = "whole-model"


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Everything that a validation measures; None where something was not measured, or says nothing."""

    fidelity: Fidelity
    #: None where the original is not at hand.
    weights: WeightCheck | None = None
    #: None where the original has no chat template.
    prompts: PromptParity | None = None
    #: None where nothing was asked.
    behaviour: Behaviour | None = None
    shares: tuple[Share, ...] = ()
    #: The routing of a mixture of experts, on the texts of the shares.
    routing: tuple[LayerRouting, ...] = ()
    #: None where it would say nothing, as on an emulated device.
    performance: Performance | None = None
    performance_absent_because: str | None = None
    #: None where the original is not at hand and nobody checked it when it was captured.
    reference: ReferenceCheck | None = None
    #: The arithmetic of the original; None where it was captured by a version that did not note it.
    arithmetic: OriginalArithmetic | None = None


@dataclass(frozen=True, kw_only=True)
class Validation(Measurements):
    """Everything that was measured, the gates, and the verdict."""

    gates: tuple[Gate, ...]
    verdict: Verdict


def validate(
    bundle: Bundle,
    reference: Reference,
    evaluation: EvaluationSet,
    conditions: Conditions,
    scratch: Path,
    pieces: Pieces = UNKEPT,
) -> Validation | None:
    """Run the exported graph and the original over the texts of ``evaluation`` and compare them.

    Args:
        bundle: the bundle.
        reference: its original.
        evaluation: what both are asked.
        conditions: the amounts that are measured, the limits that the bundle has to keep, and the threads.
        scratch: the directory where the original's hidden states are kept meanwhile.
        pieces: where finished pieces are kept, and the ranks that share them; only rank 0 returns something.

    Raises:
        InputError: nothing would be judged, or a task fills the context.
        MachineError: the bundle's execution provider is not here, or memory does not suffice.
    """
    plan, progress, ranks = conditions.plan, conditions.progress, pieces.ranks
    texts = evaluation.texts(reference.architecture.context_length, plan)
    torch.set_num_threads(conditions.threads)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        place = Path(folder)
        session = ScoringSession(bundle, conditions.bundle_threads)
        both = _Both(reference, session, texts, conditions, place, pieces)
        groups = {(task.name, task.metric) for task in evaluation.tasks}
        found = judge_text(texts, both.compare, conditions, len(groups) if plan.behaviour else 0, ranks)
        first = both.first
        # A session has a copy of all weights, and what follows is computed without it.
        del session, both
        # The first rank owns the first batch.
        check = first.check(place, plan.max_memory_bytes, progress, pieces) if ranks.first else None
        noise = first.texts.noise()
        shares, routing = shares_of(
            bundle, first.texts, first.shipped, plan.share_texts, pieces, place, progress
        )
        first.texts.forget()
        # On some file systems a folder with open files cannot be removed.
        del first
        behaviour = _behaviour(bundle, reference, evaluation, conditions, place, pieces)
    weights = check_weights(bundle, reference, progress, pieces)
    # Speed is that of a machine on which nothing else is at work.
    ranks.barrier()
    if not ranks.first:
        return None
    measured = Measurements(
        fidelity=found.fidelity(evaluation.tokenizer, arithmetic(bundle.manifest), noise),
        weights=weights,
        performance=_performance(bundle, reference.checkpoint, texts, conditions),
        prompts=prompt_parity(golden_prompts(reference.checkpoint, evaluation), bundle.tokenizer),
        behaviour=behaviour,
        shares=shares,
        routing=routing,
        reference=check,
        arithmetic=conditions.arithmetic,
    )
    return judged(measured, bundle.manifest, conditions.policy, host_gate(bundle))


def validate_captured(bundle: Bundle, captured: CapturedReference, conditions: Conditions) -> Validation:
    """Run the exported graph over the texts that the original was asked about when it was captured.

    The shares of the divergence and the original's speed are not measured: they need the original itself.

    Raises:
        MachineError: the bundle's execution provider is not here, or memory does not suffice.
    """
    plan, progress, capture = conditions.plan, conditions.progress, captured.capture
    session = ScoringSession(bundle, conditions.bundle_threads)
    texts, tokenizer = captured.texts, bundle.tokenizer
    answers = partial(bundle_answer, session, texts)
    found = _judged_against(captured, session, conditions)
    fidelity = found.fidelity(tokenizer, arithmetic(bundle.manifest), capture.noise, captured.audit(answers))
    # A session has a copy of all weights, and the next one is opened without it.
    del session, answers
    performance = _performance(bundle, None, texts, conditions)
    parity = prompt_parity(capture.prompts, tokenizer)
    behaviour = None
    if plan.behaviour and capture.answers:
        behaviour = ask_bundle(
            [answer.question for answer in capture.answers],
            [list(answer.tokens) for answer in capture.answers],
            BundleSessions.for_bundle(bundle, conditions.bundle_threads),
            plan=plan.behaviour,
            progress=progress,
        )
    measured = Measurements(
        fidelity=fidelity,
        prompts=parity,
        behaviour=behaviour,
        performance=performance,
        reference=capture.reference_check,
        arithmetic=capture.arithmetic,
    )
    return judged(measured, bundle.manifest, conditions.policy, host_gate(bundle))


@dataclass(frozen=True)
class _FirstLook:
    """The texts of the first look, for the noise floor and the shares; it has every language."""

    texts: SharedTexts
    #: The divergences of the texts that were run twice.
    shipped: Sequence[Divergence]

    def check(self, scratch: Path, limit_bytes: int | None, progress: Progress, pieces: Pieces) -> ReferenceCheck:
        """Return whether the original is the model that transformers loads, by one of the first batch's texts."""
        kept = pieces.load(_CHECK, self.texts.name(0))
        if kept is not None:
            return ReferenceCheck.model_validate(kept.facts)
        states = self.texts.original(0).states
        check = check_reference(self.texts.reference, states.texts, scratch, limit_bytes, progress, states)
        if not check.absent_because:
            pieces.save(_CHECK, self.texts.name(0), Parcel(facts=check.model_dump()))
        return check


class _Both:
    """The original and the bundle, which are asked about a look at a time."""

    def __init__(
        self,
        reference: Reference,
        session: ScoringSession,
        texts: Sequence[EvaluationText],
        conditions: Conditions,
        scratch: Path,
        pieces: Pieces,
    ) -> None:
        self._reference, self._session, self._texts = reference, session, texts
        self._conditions, self._scratch, self._pieces = conditions, scratch, pieces
        self._first: _FirstLook | None = None

    @property
    def first(self) -> _FirstLook:
        """The first look, once it was taken."""
        assert self._first is not None
        return self._first

    def compare(self, indices: Sequence[int], words: str) -> list[Divergence]:
        """Return the divergences of these texts: one pass of the original over its blocks."""
        # The same texts as of a captured reference, which knows nothing of looks.
        first = () if self._first else first_texts(self._texts, max(1, self._conditions.plan.share_texts))
        sample = [place for place, index in enumerate(indices) if index in first]
        shared = SharedTexts(
            self._reference,
            [self._texts[index] for index in indices],
            sample,
            threads=self._conditions.threads,
            pieces=self._pieces,
            scratch=self._scratch,
            progress=self._conditions.progress,
            label=f"Original, block by block{words}",
        )
        divergences = shared.divergences(partial(partial, bundle_answer, self._session), f"{_IN_ONNX_RUNTIME}{words}")
        if self._first is None:
            self._first = _FirstLook(shared, [divergences[place] for place in sample])
        else:
            shared.forget()
        return divergences


def _judged_against(captured: CapturedReference, session: ScoringSession, conditions: Conditions) -> JudgedText:
    """Return the text that was judged of what the original was asked about when it was captured."""

    def measure(indices: Sequence[int], words: str) -> list[Divergence]:
        chosen, label = ChosenAnswers(captured, indices), f"{_IN_ONNX_RUNTIME}{words}"
        return compare(chosen, partial(bundle_answer, session, chosen.texts), conditions.progress, label)

    return judge_text(captured.texts, measure, conditions, 0)


def judged(measured: Measurements, manifest: Manifest, policy: Gates, also: tuple[Gate, ...] = ()) -> Validation:
    """Return ``measured`` with the gates of ``policy``, those that the manifest decides, ``also``, and the verdict."""
    gates = apply_gates(measured.fidelity, policy, measured.behaviour) + reference_gate(measured.reference)
    if measured.weights:
        gates += weight_gates(measured.weights)
    if measured.fidelity.capture:
        gates += (capture_gate(measured.fidelity.capture),)
    if measured.prompts:
        gates += (prompt_gate(measured.prompts),)
    gates += performance_gates(measured.performance, policy, measured.performance_absent_because)
    gates += manifest_gates(manifest) + also
    return Validation(**vars(measured), gates=gates, verdict=verdict_of(gates))


def arithmetic(manifest: Manifest) -> str:
    """Return the arithmetic that the bundle computes with, in words."""
    recipe = manifest.recipe
    if recipe.linears is None:
        return "fp32 weights and activations"
    level = manifest.target.weights.accuracy_level
    activations = "int8 activations" if level == 4 else "fp32 activations"
    heads = [matrix.bits for matrix in manifest.matrices if matrix.part == "lm_head"]
    head = f", {heads[0]}-bit lm_head" if heads else ""
    kinds = sorted({matrix.bits for matrix in manifest.matrices if matrix.layer is not None})
    weights = f"{'/'.join(str(bits) for bits in kinds)}-bit weights"
    return f"{weights}{head}, {activations} (accuracy_level {level})"


def _behaviour(
    bundle: Bundle,
    reference: Reference,
    evaluation: EvaluationSet,
    conditions: Conditions,
    scratch: Path,
    pieces: Pieces,
) -> Behaviour | None:
    plan = conditions.plan.behaviour
    if plan is None:
        return None
    # The bundle's own tokenizer, which a server uses. The gate on prompts says whether it is the original's.
    sessions = BundleSessions.for_bundle(bundle, conditions.bundle_threads)
    asked = questions_for(evaluation.documents, sessions.tokenizer, plan, sessions.context_length)
    if not asked and all(task.choices for task in evaluation.tasks):
        # No task is answered by a text, so that nothing could be told of answers.
        return None
    return ask(
        asked,
        evaluation.tasks,
        sessions,
        reference,
        plan=plan,
        scratch=scratch,
        progress=conditions.progress,
        pieces=pieces,
    )


def _performance(
    bundle: Bundle, checkpoint: Checkpoint | None, texts: Sequence[EvaluationText], conditions: Conditions
) -> Performance:
    prompt = torch.cat([text.ids for text in texts])[: conditions.plan.prompt_tokens].tolist()
    return measure_performance(bundle, checkpoint, prompt, conditions)
