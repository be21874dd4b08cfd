"""The plane of behaviour: what is asked, what both answer, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from glmexport.bundle.bundle import Bundle
from glmexport.calibration.corpus import Document
from glmexport.engine.generation import GenerationSession
from glmexport.engine.options import computes_together
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Progress
from glmexport.reference.reference import Reference
from glmexport.results.behaviour import Behaviour
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.behaviour.choices import choice_scores, choice_texts
from glmexport.validation.behaviour.drafting import DraftCost
from glmexport.validation.behaviour.measure import Answers, asked_alone, bundle_answers, judge
from glmexport.validation.behaviour.original import Begun, Drafts, VerifiedAnswers, verified_answers
from glmexport.validation.behaviour.questions import Question, questions, some_of_each_kind, task_question
from glmexport.validation.behaviour.tasks import Task
from glmexport.validation.conditions import BehaviourPlan
from glmexport.validation.pieces import UNKEPT, Pieces
from glmexport.validation.reference import reference_states
from glmexport.validation.shares import bundle_answer
from glmexport.validation.texts import EvaluationText, text_digest

#: Number of questions that the original answers together, whoever asks it. Where experts are read for them it is all.
TOGETHER = 64
#: The most tokens of a prompt and its answer with which others are answered together: every one has caches for as many.
_LONGEST_TOGETHER = 2048


@dataclass(frozen=True)
class BundleSessions:
    """The ways to open a bundle, of which each session has a copy of all weights, and what is known without one.

    ``generation`` opens one that answers so many prompts together, 0 for one by one; ``scoring`` one that scores texts.
    """

    generation: Callable[[int], GenerationSession]
    scoring: Callable[[], ScoringSession]
    #: Whether the bundle computes answers together.
    batches: bool
    #: The bundle's own, as a server has it.
    tokenizer: Tokenizer
    context_length: int

    @classmethod
    def for_bundle(cls, bundle: Bundle, threads: int) -> BundleSessions:
        """Return those of ``bundle`` in so many threads, with its own tokenizer, which a server uses."""
        return cls(
            lambda batch: GenerationSession.open(bundle, threads, batch=batch),
            partial(ScoringSession, bundle, threads),
            computes_together(bundle),
            bundle.tokenizer,
            bundle.context_length,
        )

    def batch(self, plan: BehaviourPlan, asked: Sequence[Question], progress: Progress) -> int:
        """Return how many of the prompts ``asked`` are answered together; 0: each alone."""
        if not self.batches or not plan.batch:
            return 0
        longest = max((len(question.ids) + question.max_tokens for question in asked), default=0)
        if longest > _LONGEST_TOGETHER:
            progress.remark(
                f"A prompt and its answer have up to {longest} tokens: prompts are answered one by one, as caches for "
                f"{plan.batch} such texts may not fit into memory."
            )
            return 0
        return plan.batch


def questions_for(
    documents: Sequence[Document], tokenizer: Tokenizer, plan: BehaviourPlan, context_length: int
) -> list[Question]:
    """Return the shipped questions, or as many as ``plan`` allows, with answers as long as the context allows."""
    asked = questions(documents, tokenizer, each=plan.each, translations=plan.translations, max_tokens=plan.max_tokens)
    if plan.most is not None:
        asked = some_of_each_kind(asked, plan.most)
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
    batch = sessions.batch(plan, asked, progress)
    session = sessions.generation(batch)
    bundle = bundle_answers(session, asked, batch, progress, pieces)
    original = _verified(asked, bundle, batch, session, reference, scratch, progress, pieces)
    # A session has a copy of all weights, and the next one is opened without it.
    ends = session.ends
    del session
    alone = _alone(asked, batch, sessions, plan, progress, pieces)
    answers = _answers(original, bundle, ends, batch, alone)
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
    asked: Sequence[Question],
    sessions: BundleSessions,
    reference: Reference,
    *,
    plan: BehaviourPlan,
    scratch: Path,
    progress: Progress,
) -> list[list[int]]:
    """Ask the original, with a bundle that drafts, and return its answers."""
    batch = sessions.batch(plan, asked, progress)
    session = sessions.generation(batch)
    drafts = bundle_answers(session, asked, batch, progress)
    return _verified(asked, drafts, batch, session, reference, scratch, progress).tokens


def ask_bundle(
    asked: Sequence[Question],
    original: Sequence[list[int]],
    sessions: BundleSessions,
    *,
    plan: BehaviourPlan,
    progress: Progress,
) -> Behaviour:
    """Ask the bundle what the ``original`` has answered already."""
    batch = sessions.batch(plan, asked, progress)
    session = sessions.generation(batch)
    bundle, ends = bundle_answers(session, asked, batch, progress), session.ends
    # A session has a copy of all weights, and the next one is opened without it.
    del session
    alone = _alone(asked, batch, sessions, plan, progress)
    return judge(asked, _answers(VerifiedAnswers(list(original)), bundle, ends, batch, alone), sessions.tokenizer)


def _verified(
    asked: Sequence[Question],
    bundle: Sequence[list[int]],
    batch: int,
    session: GenerationSession,
    reference: Reference,
    scratch: Path,
    progress: Progress,
    pieces: Pieces = UNKEPT,
) -> VerifiedAnswers:
    return verified_answers(
        reference,
        [question.ids for question in asked],
        _drafts(session, asked, bundle, batch, progress),
        limits=[question.max_tokens for question in asked],
        ends=session.ends,
        scratch=scratch,
        progress=progress,
        together=None if reference.architecture.routed else TOGETHER,
        cost=DraftCost.by_bundle(batch),
        pieces=pieces,
    )


def _drafts(
    session: GenerationSession,
    asked: Sequence[Question],
    answers: Sequence[list[int]],
    batch: int,
    progress: Progress,
) -> Drafts:
    """Return a function to the tokens with which the bundle continues, first of all its own ``answers``."""

    def drafts(begun: Sequence[Begun]) -> list[list[int]]:
        again = [
            asked[each.index].model_copy(
                update={"ids": [*asked[each.index].ids, *each.answer], "max_tokens": each.most}
            )
            for each in begun
            if each.answer
        ]
        found = iter(bundle_answers(session, again, batch, progress, label="Bundle's drafts") if again else ())
        return [next(found) if each.answer else answers[each.index] for each in begun]

    return drafts


def _alone(
    asked: Sequence[Question],
    batch: int,
    sessions: BundleSessions,
    plan: BehaviourPlan,
    progress: Progress,
    pieces: Pieces = UNKEPT,
) -> dict[str, list[int]]:
    """Return some answers of the bundle by question's id, each computed alone; none without a ``batch``: all are."""
    if not batch:
        return {}
    chosen = asked_alone(asked, plan.alone_every)
    answers = bundle_answers(sessions.generation(0), chosen, 0, progress, pieces, label="Bundle's answers, alone")
    return {question.id: answer for question, answer in zip(chosen, answers, strict=True)}


def _answers(
    original: VerifiedAnswers,
    bundle: Sequence[list[int]],
    ends: Collection[int],
    batch: int,
    alone: Mapping[str, list[int]],
) -> Answers:
    return Answers(
        original.tokens,
        bundle,
        ends,
        original.passes,
        batch=batch,
        alone=alone,
        tokens_computed=original.computed,
        tokens_needed=original.needed,
        recomputed=original.unkept,
    )
