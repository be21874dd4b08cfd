"""The plane of behaviour: what is asked, what both answer, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from glmexport.calibration.corpus import Document
from glmexport.engine.generation import GenerationSession
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Progress
from glmexport.reference.reference import Reference
from glmexport.results.behaviour import Behaviour
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.behaviour.choices import choice_scores, choice_texts
from glmexport.validation.behaviour.measure import Answers, answers_together, bundle_answers, judge
from glmexport.validation.behaviour.original import Draft, VerifiedAnswers, verified_answers
from glmexport.validation.behaviour.questions import Question, questions, task_question
from glmexport.validation.behaviour.tasks import Task
from glmexport.validation.conditions import BehaviourPlan
from glmexport.validation.pieces import UNKEPT, Pieces
from glmexport.validation.reference import reference_states
from glmexport.validation.shares import bundle_answer
from glmexport.validation.texts import EvaluationText, text_digest

#: Number of questions that the original answers together, whoever asks it. Where experts are read for them it is all.
TOGETHER = 32


@dataclass(frozen=True)
class BundleSessions:
    """The ways to open a bundle, of which each session has a copy of all weights, and what is known without one.

    ``generation`` opens one that answers, ``scoring`` one that scores texts.
    """

    generation: Callable[[], GenerationSession]
    scoring: Callable[[], ScoringSession]
    #: The bundle's own, as a server has it.
    tokenizer: Tokenizer
    context_length: int


def questions_for(
    documents: Sequence[Document], tokenizer: Tokenizer, plan: BehaviourPlan, context_length: int
) -> list[Question]:
    """Return the shipped questions, with answers as long as the context allows."""
    asked = questions(documents, tokenizer, each=plan.each, translations=plan.translations, max_tokens=plan.max_tokens)
    return [_fitted(question, context_length) for question in asked if len(question.ids) < context_length]


def _fitted(question: Question, context_length: int) -> Question:
    room = context_length - len(question.ids)
    return question if question.max_tokens <= room else question.model_copy(update={"max_tokens": room})


def task_questions(
    tasks: Sequence[Task], tokenizer: Tokenizer, plan: BehaviourPlan, context_length: int
) -> tuple[list[EvaluationText], list[Question]]:
    """Return the ``tasks`` in tokens: a text for every choice of those that have some, and a question for each other.

    Raises:
        InputError: a task fills the context.
        CheckpointError: the chat template cannot write one.
    """
    texts = choice_texts(tasks, tokenizer)
    own = [task_question(task, tokenizer, plan.max_tokens) for task in tasks if task.choices is None]
    for name, length in [
        *((each.id, len(each.ids)) for each in own),
        *((text.document, len(text.ids)) for text in texts),
    ]:
        if length >= context_length:
            raise InputError(
                f"The task {name} has {length} tokens and the context {context_length}.", next_step="Shorten it."
            )
    return texts, own


def ask(
    shipped: Sequence[Question],
    tasks: Sequence[Task],
    sessions: BundleSessions,
    reference: Reference,
    *,
    plan: BehaviourPlan,
    scratch: Path,
    progress: Progress,
    pieces: Pieces = UNKEPT,
) -> Behaviour | None:
    """Ask both models the ``shipped`` questions and ``tasks`` of the user's, with one session open at a time.

    The ranks of ``pieces`` share the answers, and the first of them judges and returns something.

    Raises:
        InputError: a task fills the context.
    """
    tokenizer = sessions.tokenizer
    texts, own = task_questions(tasks, tokenizer, plan, sessions.context_length)
    asked = [*shipped, *(_fitted(question, sessions.context_length) for question in own)]
    choices = {}
    if texts:
        choices = pieces.one(
            "choices", text_digest(texts), lambda: _choices(tasks, texts, sessions, reference, scratch, progress)
        )
    session = sessions.generation()
    bundle = bundle_answers(session, asked, progress, pieces)
    original = _verified(asked, bundle, session, reference, scratch, progress, pieces)
    answers = _answers(session, asked, original, bundle, plan, progress, pieces)
    return judge(asked, answers, tokenizer, tasks, choices) if pieces.ranks.first else None


def _choices(
    tasks: Sequence[Task],
    texts: Sequence[EvaluationText],
    sessions: BundleSessions,
    reference: Reference,
    scratch: Path,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """Return the scores of the original and of the bundle by task with choices."""
    states = reference_states(reference, texts, scratch, progress, label="Original's choices")
    before = choice_scores(tasks, texts, lambda index: reference.logits(states.states(index)))
    after = choice_scores(tasks, texts, partial(bundle_answer, sessions.scoring(), texts))
    return {id_: (score, after[id_]) for id_, score in before.items()}


def ask_original(
    asked: Sequence[Question], session: GenerationSession, reference: Reference, scratch: Path, progress: Progress
) -> list[list[int]]:
    """Ask the original, with a bundle that drafts, and return its answers."""
    drafts = bundle_answers(session, asked, progress)
    return _verified(asked, drafts, session, reference, scratch, progress).tokens


def ask_bundle(
    asked: Sequence[Question],
    original: Sequence[list[int]],
    session: GenerationSession,
    tokenizer: Tokenizer,
    *,
    plan: BehaviourPlan,
    progress: Progress,
) -> Behaviour:
    """Ask the bundle what the ``original`` has answered already."""
    bundle = bundle_answers(session, asked, progress)
    given = VerifiedAnswers(list(original))
    return judge(asked, _answers(session, asked, given, bundle, plan, progress), tokenizer)


def _verified(
    asked: Sequence[Question],
    bundle: Sequence[list[int]],
    session: GenerationSession,
    reference: Reference,
    scratch: Path,
    progress: Progress,
    pieces: Pieces = UNKEPT,
) -> VerifiedAnswers:
    return verified_answers(
        reference,
        [question.ids for question in asked],
        _drafts(session, asked, bundle),
        limits=[question.max_tokens for question in asked],
        ends=session.ends,
        scratch=scratch,
        progress=progress,
        together=None if reference.architecture.routed else TOGETHER,
        pieces=pieces,
    )


def _drafts(
    session: GenerationSession, asked: Sequence[Question], answers: Sequence[list[int]]
) -> Draft:
    """Return a function to the tokens with which the bundle continues, first of all its own ``answers``."""

    def draft(index: int, so_far: list[int], most: int) -> list[int]:
        if not so_far:
            return answers[index]
        return session.tokens([*asked[index].ids, *so_far], most)

    return draft


def _answers(
    session: GenerationSession,
    asked: Sequence[Question],
    original: VerifiedAnswers,
    bundle: Sequence[list[int]],
    plan: BehaviourPlan,
    progress: Progress,
    pieces: Pieces = UNKEPT,
) -> Answers:
    return Answers(
        original.tokens,
        bundle,
        session.ends,
        original.passes,
        together=answers_together(session, asked, plan.batch, progress, pieces) if plan.batch else {},
        batch=plan.batch,
        tokens_computed=original.computed,
        tokens_needed=original.needed,
        recomputed=original.unkept,
    )
