"""A bundle against its original, on this machine: fidelity, where the divergence comes from, speed, and the gates."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from glmexport.architecture.description import Architecture
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import Manifest
from glmexport.calibration.corpus import Document
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.engine.generation import GenerationSession
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Progress
from glmexport.foundation.target import Gates
from glmexport.reference.reference import Reference
from glmexport.results.behaviour import Behaviour
from glmexport.results.fidelity import Fidelity, LanguageFidelity, Share
from glmexport.results.gate import Gate
from glmexport.results.performance import Performance
from glmexport.results.prompts import PromptParity
from glmexport.results.record import Verdict
from glmexport.results.reference import ReferenceCheck
from glmexport.results.routing import LayerRouting
from glmexport.results.weights import WeightCheck
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.behaviour.plane import BehaviourPlan, ask, ask_bundle, questions_for
from glmexport.validation.behaviour.tasks import Task
from glmexport.validation.capture import CapturedReference
from glmexport.validation.fidelity import Streamed, compare, statistics_of, summarize
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
from glmexport.validation.performance import measure_performance
from glmexport.validation.performance_gates import performance_gates
from glmexport.validation.prompts import golden_prompts, prompt_parity
from glmexport.validation.reference import reference_states
from glmexport.validation.routing import Routes, routing_agreement
from glmexport.validation.shares import bundle_answer, shares_of
from glmexport.validation.texts import EvaluationText, evaluation_texts
from glmexport.validation.weights import check_weights
from glmexport.validation.whole_model import check_reference

#: Texts that the original is asked about at a time when it is compared with itself; one, otherwise.
_OTHER_BATCH = 4
_IN_ONNX_RUNTIME = "Bundle in ONNX Runtime"


@dataclass(frozen=True)
class ValidationPlan:
    """How much is measured."""

    positions_per_language: int = 2048
    longest_text: int = 512
    #: Texts a language for the shares of the divergence, each of which costs another pass of the original.
    share_texts: int = 1
    prompt_tokens: int = 128
    generated_tokens: int = 64
    #: Rounds of speed go on for so long; 0: two, which give no bounds.
    speed_seconds: float = 25
    #: What computing the original whole may take, beside the rest of this process; None: most of the free memory.
    max_memory_bytes: int | None = None
    #: None asks for no answers.
    behaviour: BehaviourPlan | None = field(default_factory=BehaviourPlan)


@dataclass(frozen=True)
class Validation:
    """Everything that was measured, and the verdict."""

    fidelity: Fidelity
    #: None where the original is not at hand.
    weights: WeightCheck | None
    #: None where the original has no chat template.
    prompts: PromptParity | None
    #: None where nothing was asked.
    behaviour: Behaviour | None
    shares: tuple[Share, ...]
    #: Of mixtures of experts, on the texts of the shares.
    routing: tuple[LayerRouting, ...]
    #: None where it would say nothing, as on an emulated device.
    performance: Performance | None
    gates: tuple[Gate, ...]
    verdict: Verdict
    performance_absent_because: str | None = None
    #: None where the original is not at hand and nobody checked it when it was captured.
    reference: ReferenceCheck | None = None


def texts_for(
    documents: Sequence[Document], tokenizer: Tokenizer, architecture: Architecture, plan: ValidationPlan
) -> list[EvaluationText]:
    """What is asked.

    Raises:
        InputError: nothing.
    """
    texts = evaluation_texts(
        documents,
        tokenizer,
        positions_per_language=plan.positions_per_language,
        longest=min(plan.longest_text, architecture.context_length),
    )
    if not texts:
        raise InputError("There is no evaluation text.", next_step="Give languages that the corpora have.")
    return texts


def validate(
    directory: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    architecture: Architecture,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    plan: ValidationPlan,
    policy: Gates,
    threads: int,
    bundle_threads: int,
    scratch: Path,
    progress: Progress,
    tasks: Sequence[Task] = (),
) -> Validation:
    """Run the exported graph and the original over ``documents`` and compare them.

    Args:
        directory: the bundle.
        manifest: its manifest.
        checkpoint: the original.
        architecture: of both.
        tokenizer: of both.
        documents: evaluation text, disjoint from what the bundle was calibrated on.
        plan: how much to measure.
        policy: what the bundle has to keep.
        threads: of the original.
        bundle_threads: of the bundle.
        scratch: where the original's hidden states are kept meanwhile.
        progress: who watches.
        tasks: of the user's, to be asked as well.
    """
    texts = texts_for(documents, tokenizer, architecture, plan)
    torch.set_num_threads(threads)
    reference = Reference(checkpoint, architecture)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        session = ScoringSession(Bundle(directory, manifest), bundle_threads)
        check = check_reference(reference, texts, Path(folder), plan.max_memory_bytes, progress)
        states = reference_states(reference, texts, Path(folder), progress)
        divergences = compare(
            Streamed(states, reference), partial(bundle_answer, session, texts), progress, _IN_ONNX_RUNTIME
        )
        sample = Streamed(states.only(first_texts(texts, max(1, plan.share_texts))), reference)
        before, after = Routes(), Routes()
        noise = noise_floor(sample, threads, Path(folder), progress, before)
        fidelity = summarize(texts, divergences, tokenizer, arithmetic(manifest), noise)
        shares = shares_of(directory, manifest, sample, plan.share_texts, session, Path(folder), progress, after)
        routing = routing_agreement(before, after) if shares else ()
        bundle = Bundle(directory, manifest)
        behaviour = _behaviour(
            bundle, documents, tasks, session, reference, plan, bundle_threads, Path(folder), progress
        )
    weights = check_weights(directory, manifest, reference, progress)
    performance = _performance(directory, manifest, checkpoint, texts, plan, policy, threads, bundle_threads, progress)
    prompts = prompt_parity(golden_prompts(checkpoint, documents), Tokenizer.open(directory))
    here = host_gate(manifest)
    return judged(
        fidelity, weights, prompts, behaviour, shares, routing, performance, manifest, policy, also=here, checked=check
    )


def validate_captured(
    directory: Path,
    manifest: Manifest,
    captured: CapturedReference,
    *,
    plan: ValidationPlan,
    policy: Gates,
    threads: int,
    progress: Progress,
) -> Validation:
    """Run the exported graph over the texts that the original was asked about when it was captured.

    Where the divergence comes from and the original's speed are not measured, for which it would have to be at hand.
    """
    bundle, texts = Bundle(directory, manifest), captured.texts
    session, tokenizer = ScoringSession(bundle, threads), bundle.tokenizer
    answers = partial(bundle_answer, session, texts)
    divergences = compare(captured, answers, progress, _IN_ONNX_RUNTIME)
    capture = captured.capture
    fidelity = summarize(texts, divergences, tokenizer, arithmetic(manifest), capture.noise, captured.audit(answers))
    performance = _performance(directory, manifest, None, texts, plan, policy, threads, threads, progress)
    parity = prompt_parity(capture.prompts, tokenizer)
    behaviour = None
    if plan.behaviour and capture.answers:
        behaviour = ask_bundle(
            [answer.question for answer in capture.answers],
            [list(answer.tokens) for answer in capture.answers],
            GenerationSession.open(bundle, threads),
            tokenizer,
            plan=plan.behaviour,
            progress=progress,
        )
    here = host_gate(manifest)
    check = capture.reference_check
    return judged(
        fidelity, None, parity, behaviour, (), (), performance, manifest, policy, also=here, checked=check
    )


def _behaviour(
    bundle: Bundle,
    documents: Sequence[Document],
    tasks: Sequence[Task],
    scoring: ScoringSession,
    reference: Reference,
    plan: ValidationPlan,
    threads: int,
    scratch: Path,
    progress: Progress,
) -> Behaviour | None:
    if plan.behaviour is None:
        return None
    # The bundle's own: what a server tokenizes with. Whether it is the original's is for the prompts to say.
    tokenizer, session = bundle.tokenizer, GenerationSession.open(bundle, threads)
    asked = questions_for(documents, tokenizer, plan.behaviour, session.context_length)
    if not asked and all(task.choices for task in tasks):
        # Nothing that is answered by a text, so that nothing could be told of answers.
        return None
    return ask(
        asked, tasks, session, scoring, reference, tokenizer, plan=plan.behaviour, scratch=scratch, progress=progress
    )


def judged(
    fidelity: Fidelity,
    weights: WeightCheck | None,
    prompts: PromptParity | None,
    behaviour: Behaviour | None,
    shares: tuple[Share, ...],
    routing: tuple[LayerRouting, ...],
    performance: Performance | None,
    manifest: Manifest,
    policy: Gates,
    absent: str | None = None,
    also: tuple[Gate, ...] = (),
    checked: ReferenceCheck | None = None,
) -> Validation:
    """Every gate of what was measured and ``also``, and the verdict; ``absent``: why there is no performance."""
    gates = apply_gates(fidelity, policy, behaviour) + reference_gate(checked)
    if weights:
        gates += weight_gates(weights)
    if fidelity.capture:
        gates += (capture_gate(fidelity.capture),)
    if prompts:
        gates += (prompt_gate(prompts),)
    gates += performance_gates(performance, policy, absent)
    gates += manifest_gates(manifest) + also
    verdict = verdict_of(gates)
    return Validation(
        fidelity, weights, prompts, behaviour, shares, routing, performance, gates, verdict, absent, checked
    )


def arithmetic(manifest: Manifest) -> str:
    """What the bundle computes with, in words."""
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


def noise_floor(
    original: Streamed, threads: int, scratch: Path, progress: Progress, routes: Routes | None = None
) -> LanguageFidelity:
    """The original against itself with another batch and another number of threads: what is no difference at all.

    The experts that it sends every position to are added to ``routes``.
    """
    reference = original.reference
    torch.set_num_threads(threads // 2 if threads > 1 else 2)
    try:
        again = reference_states(
            reference,
            original.texts,
            scratch,
            progress,
            label="Original again, in batches",
            batch=_OTHER_BATCH,
            routes=routes,
        )
    finally:
        torch.set_num_threads(threads)

    def answers(index: int) -> Tensor:
        return reference.logits(again.states(index))

    return statistics_of("all", compare(original, answers, progress, "Original against itself"))


def first_texts(texts: Sequence[EvaluationText], each: int) -> list[int]:
    """Indices of the first texts of every language."""
    chosen: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        if len(chosen.setdefault(text.language, [])) < each:
            chosen[text.language].append(index)
    return [index for group in chosen.values() for index in group]


def _performance(
    directory: Path,
    manifest: Manifest,
    checkpoint: Checkpoint | None,
    texts: Sequence[EvaluationText],
    plan: ValidationPlan,
    policy: Gates,
    threads: int,
    bundle_threads: int,
    progress: Progress,
) -> Performance:
    return measure_performance(
        directory,
        manifest,
        checkpoint,
        torch.cat([text.ids for text in texts])[: plan.prompt_tokens].tolist(),
        generated_tokens=plan.generated_tokens,
        seconds=plan.speed_seconds,
        confidence=policy.confidence,
        threads=threads,
        bundle_threads=bundle_threads,
        progress=progress,
    )
