"""The evaluation text in looks: a language's text ends with the first at which all its gates are decided.

Documents come in an order that follows from the text alone, and looks after fixed numbers of them, so that nothing that
was measured, and no machine, has a say in either. A look is one pass of the original over its blocks, for the next
documents of every language that goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from glmexport.foundation.progress import Progress
from glmexport.quantization.ranks import ALONE, Ranks
from glmexport.results.fidelity import CaptureBound, Fidelity, LanguageFidelity
from glmexport.results.looks import LanguageLooks, Look
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.conditions import Conditions
from glmexport.validation.divergence import Divergence
from glmexport.validation.fidelity import statistics_of, summarize
from glmexport.validation.gates import is_decided, most_tests
from glmexport.validation.sequential import Stage, levels
from glmexport.validation.texts import EvaluationText, text_digest

#: Fewest documents of a look: the errors of two say next to nothing.
_FEWEST = 3
_MOST_LOOKS = 4

#: Divergences of the texts with these indices; the words are added to the labels of its progress.
Measure = Callable[[Sequence[int], str], list[Divergence]]
#: Whether all gates of a language are decided by the divergences of its documents so far.
Decided = Callable[[str, Sequence[Divergence], Stage], bool]


@dataclass(frozen=True)
class LanguageText:
    """The documents of one language: ``order`` are their indices among all texts, ``ends`` the number at each look."""

    language: str
    order: tuple[int, ...]
    ends: tuple[int, ...]

    def stage(self, look: int) -> Stage:
        """Return the stage of the look with the index ``look``."""
        return Stage(tuple(end / len(self.order) for end in self.ends), look)

    def part(self, look: int) -> tuple[int, ...]:
        """Return the indices of the texts that the look with the index ``look`` adds."""
        return self.order[self.ends[look - 1] if look else 0 : self.ends[look]]


@dataclass(frozen=True)
class JudgedText:
    """The texts that were judged, in the order in which they were given, and the divergence of each."""

    texts: Sequence[EvaluationText]
    divergences: Sequence[Divergence]
    #: The record of the looks; empty where every language has a single one.
    looks: tuple[LanguageLooks, ...]
    #: The digest of all texts, judged or not.
    digest: str

    def fidelity(
        self, tokenizer: Tokenizer, arithmetic: str, noise: LanguageFidelity, capture: CaptureBound | None = None
    ) -> Fidelity:
        """Return the statistics; the arguments are those of ``summarize``."""
        texts, parts = self.texts, self.divergences
        return summarize(texts, parts, tokenizer, arithmetic, noise, capture, looks=self.looks, digest=self.digest)


def plan_looks(
    texts: Sequence[EvaluationText], minimum_positions: int, *, full_text: bool = False
) -> tuple[LanguageText, ...]:
    """Return the looks at ``texts``, language by language.

    Looks are at an eighth of the documents, a quarter, the half and all of them, as far as each has three documents and
    ``minimum_positions``; if not even the half has, at the fewest that have, and all. Documents of uneven length count
    as their effective number (Kish, Survey Sampling, 1965).

    Args:
        texts: all that may be judged.
        minimum_positions: the fewest that a language is judged by.
        full_text: whether all text is one look.
    """
    digest = text_digest(texts)
    languages: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        languages.setdefault(text.language, []).append(index)

    def place(index: int) -> bytes:
        return hashlib.sha256(f"{digest} {index}".encode()).digest()

    plans = []
    for language, indices in languages.items():
        order = sorted(indices, key=place)
        sizes = np.array([texts[index].positions for index in order])
        ends = (len(order),) if full_text else _ends(sizes, minimum_positions)
        plans.append(LanguageText(language, tuple(order), ends))
    return tuple(plans)


def first_texts(texts: Sequence[EvaluationText], each: int) -> list[int]:
    """Return the indices of the first ``each`` texts of every language, in the order in which looks come to them."""
    return [index for plan in plan_looks(texts, 0) for index in plan.order[:each]]


def _ends(sizes: np.ndarray, minimum_positions: int) -> tuple[int, ...]:
    """Return after how many of documents with ``sizes`` [D] positions each look is."""
    positions = sizes.cumsum()
    effective = positions**2 / np.square(sizes).cumsum()
    enough = (positions >= minimum_positions) & (effective.round() >= _FEWEST)
    ends = [len(sizes)]
    while len(ends) < _MOST_LOOKS and ends[-1] > 1 and enough[(half := -(-ends[-1] // 2)) - 1]:
        ends.append(half)
    if len(ends) == 1 and enough[:-1].any():
        ends.append(int(enough.argmax()) + 1)
    return tuple(reversed(ends))


def judge_text(
    texts: Sequence[EvaluationText],
    measure: Measure,
    conditions: Conditions,
    task_groups: int,
    ranks: Ranks = ALONE,
) -> JudgedText:
    """Judge every language until all its gates are decided, or its text ends.

    Args:
        texts: all that may be judged.
        measure: what measures a look.
        conditions: of the validation.
        task_groups: the number of groups of the user's tasks, which have gates of their own.
        ranks: the processes that measure together, of which the first decides.
    """
    policy = conditions.policy
    plans = plan_looks(texts, policy.minimum_positions, full_text=conditions.plan.full_text)
    tests = most_tests(len(plans), task_groups)

    def decided(language: str, divergences: Sequence[Divergence], stage: Stage) -> bool:
        return bool(ranks.decide(lambda: is_decided(statistics_of(language, divergences), stage, policy, tests)))

    return judge_by_looks(texts, plans, measure, decided, policy.confidence, conditions.progress)


def judge_by_looks(
    texts: Sequence[EvaluationText],
    plans: Sequence[LanguageText],
    measure: Measure,
    decided: Decided,
    confidence: float,
    progress: Progress,
) -> JudgedText:
    """Measure look after look, each for the languages that are not decided yet.

    Args:
        texts: all that may be judged.
        plans: the looks at them.
        measure: what measures a look.
        decided: what says whether a language is done.
        confidence: of each bound, over all looks together.
        progress: the observer of the looks.
    """
    found: dict[int, Divergence] = {}
    taken: dict[str, int] = {}
    most = max(len(plan.ends) for plan in plans)
    for look in range(most):
        going = [plan for plan in plans if plan.language not in taken]
        if not going:
            break
        indices = sorted(index for plan in going for index in plan.part(look))
        words = f", look {look + 1} of {most}" if most > 1 else ""
        found |= zip(indices, measure(indices, words), strict=True)
        for plan in going:
            seen = [found[index] for index in plan.order[: plan.ends[look]]]
            if look + 1 == len(plan.ends) or decided(plan.language, seen, plan.stage(look)):
                taken[plan.language] = look + 1
        if most > 1:
            progress.remark(
                f"Look {look + 1} of at most {most}: {len(found)} of {len(texts)} documents compared, {len(taken)} of "
                f"{len(plans)} languages done."
            )
    judged = sorted(found)
    looks = tuple(
        LanguageLooks(
            language=plan.language, planned=planned_looks(plan, texts, confidence), taken=taken[plan.language]
        )
        for plan in plans
        if most > 1
    )
    return JudgedText([texts[index] for index in judged], [found[index] for index in judged], looks, text_digest(texts))


def planned_looks(plan: LanguageText, texts: Sequence[EvaluationText], confidence: float) -> tuple[Look, ...]:
    """Return the looks at one language of ``texts``, with the levels that keep ``confidence`` over all of them."""
    positions = np.cumsum([texts[index].positions for index in plan.order])
    risks = levels(plan.stage(0).fractions, 1 - confidence)
    return tuple(
        Look(documents=end, positions=int(positions[end - 1]), level=level)
        for end, level in zip(plan.ends, risks, strict=True)
    )
