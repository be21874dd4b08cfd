"""The text that a verdict needs, and the time that this machine takes for it.

The text follows from how far documents differ, which an earlier validation of the bundle has measured, and from
the limits of a policy; the time follows from a few documents through the bundle and one block of the original.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.definition import Count, Number
from glmexport.foundation.target import Gates
from glmexport.reference.reference import Reference
from glmexport.results.fidelity import LanguageFidelity
from glmexport.results.looks import Look
from glmexport.results.record import Record
from glmexport.validation.divergence import divergence
from glmexport.validation.gates import judged_estimates, most_tests
from glmexport.validation.statistics import POWER, documents_needed, showable_limit, with_documents
from glmexport.validation.texts import EvaluationText

#: Number of documents that are timed.
_TIMED = 3


class Need(Record):
    """The documents that one gate needs in one language."""

    gate: str
    language: str
    """BCP-47 tag of the language."""
    value: Number
    limit: Number
    documents: Count
    """Number of documents that there are."""
    needed: Count | None
    """Number of documents that decide in four of five cases, if the value is the true one; None if it is too near the
    limit, or nothing says how far documents differ."""
    showable: Number | None
    """The limit nearest to the value that ``documents`` would show to be kept in four of five cases."""


class Rates(Record):
    """The speed of this machine, in seconds."""

    threads: Count
    per_position: Number
    """Time of one position through the bundle, through all blocks of the original and its lm_head, and to compare
    them."""
    bundle_per_position: Number
    """Time of one position through the bundle, which is a part of ``per_position``."""
    fixed: Number
    """Time to read every block of the original once; 0 where it was captured."""


class ExpectedText(Record):
    """The text of one language that a validation in looks is expected to judge, if the values are the true ones."""

    language: str
    """BCP-47 tag of the language."""
    look: Count
    """The first look at which every gate is decided in four of five cases; the last one if there is none."""
    looks: Count
    """Number of looks that are planned."""
    documents: Count
    positions: Count


class Plan(Record):
    """The documents that a validation has, and those that it would need."""

    power: Number
    """Chance that a gate is decided, if the values are the true ones."""
    confidence: Number
    needs: tuple[Need, ...]
    documents: Count
    positions: Count
    seconds: Number
    """Time of a comparison over all ``documents`` at once, in seconds, speed and free answers apart."""
    expected: tuple[ExpectedText, ...]
    """The text that is expected to be judged, language by language."""
    expected_positions: Count
    expected_seconds: Number
    """Time of a comparison over ``expected_positions``, in seconds; every look reads all blocks of the original."""
    needed_documents: Count
    needed_positions: Count
    needed_seconds: Number
    """Time of a comparison over as many documents in every language as its gates need, in seconds; gates that nothing
    would decide are left out."""
    undecidable: Count
    """Number of gates for which no number of documents can be told."""
    rates: Rates

    def needed(self, language: str) -> int:
        """Return the number of documents for every gate of ``language``, at least those there are."""
        rows = [need for need in self.needs if need.language == language]
        return max(max(need.needed or 0, need.documents) for need in rows)


def plan_validation(
    languages: Sequence[LanguageFidelity],
    policy: Gates,
    rates: Rates,
    looks: Mapping[str, Sequence[Look]] | None = None,
) -> Plan:
    """Return what the gates of ``policy`` need beyond the text that there is.

    Args:
        languages: what an earlier validation found.
        policy: the limits, and how sure they have to be.
        rates: the speed of this machine.
        looks: the looks at the text that there is, by language; None: one, at the text of the earlier validation.
    """
    text = {row.language: (looks or {}).get(row.language) or (_all_of(row, policy),) for row in languages}
    needs = tuple(need for row in languages for need in _needs(row, policy, text[row.language][-1]))
    documents = {language: each[-1].documents for language, each in text.items()}
    length = {row.language: row.positions / row.documents for row in languages}
    missing = {
        language: max([0, *((need.needed or 0) - count for need in needs if need.language == language)])
        for language, count in documents.items()
    }
    positions = sum(each[-1].positions for each in text.values())
    needed = positions + math.ceil(sum(count * length[language] for language, count in missing.items()))
    expected = tuple(_expected(row, policy, text[row.language], len(languages)) for row in languages)
    judged = sum(each.positions for each in expected)
    return Plan(
        power=POWER,
        confidence=policy.confidence,
        needs=needs,
        documents=sum(documents.values()),
        positions=positions,
        seconds=rates.fixed + positions * rates.per_position,
        expected=expected,
        expected_positions=judged,
        expected_seconds=rates.fixed * max(each.look for each in expected) + judged * rates.per_position,
        needed_documents=sum(documents.values()) + sum(missing.values()),
        needed_positions=needed,
        needed_seconds=rates.fixed + needed * rates.per_position,
        undecidable=sum(need.needed is None for need in needs),
        rates=rates,
    )


def _all_of(row: LanguageFidelity, policy: Gates) -> Look:
    return Look(documents=row.documents, positions=row.positions, level=1 - policy.confidence)


def _expected(row: LanguageFidelity, policy: Gates, looks: Sequence[Look], languages: int) -> ExpectedText:
    """Return the first look at which as many documents decide every gate."""
    tests = most_tests(languages, 0)

    def decides(look: Look) -> bool:
        needs = [documents_needed(e.estimate, e.limit, 1 - look.level, tests) for e in judged_estimates(row, policy)]
        return all(need is not None and need <= look.documents for need in needs)

    index = next((index for index, look in enumerate(looks) if decides(look)), len(looks) - 1)
    return ExpectedText(
        language=row.language,
        look=index + 1,
        looks=len(looks),
        documents=looks[index].documents,
        positions=looks[index].positions,
    )


def _needs(row: LanguageFidelity, policy: Gates, whole: Look) -> list[Need]:
    """Return what each gate needs at the last look, by the level that is left for it."""
    found, confidence = [], 1 - whole.level
    for each in judged_estimates(row, policy):
        needed = documents_needed(each.estimate, each.limit, confidence)
        showable = showable_limit(with_documents(each.estimate, whole.documents), confidence)
        value, limit = each.estimate.value, each.limit
        if each.complement:
            value, limit, showable = 1 - value, 1 - limit, None if showable is None else 1 - showable
        found.append(
            Need(
                gate=each.name,
                language=row.language,
                value=value,
                limit=limit,
                documents=whole.documents,
                needed=needed,
                showable=showable,
            )
        )
    return found


def measure_rates(
    session: ScoringSession, texts: Sequence[EvaluationText], reference: Reference | None, threads: int
) -> Rates:
    """Time the longest of ``texts`` through both models.

    Blocks are of one shape but where an architecture mixes dense and sparse ones, so one of each kind is timed.
    """
    torch.set_num_threads(threads)
    timed = sorted(texts, key=lambda text: len(text.ids), reverse=True)[:_TIMED]
    positions = sum(text.positions for text in timed)
    session.logits(timed[0].ids.numpy())
    answers: list[Tensor] = []
    started = time.perf_counter()
    for text in timed:
        answers.append(torch.from_numpy(session.logits(text.ids.numpy())[text.prefix - 1 : -1]))
    bundle = (time.perf_counter() - started) / positions
    per_position, fixed = bundle, 0.0
    if reference is not None:
        read, blocks = _original_seconds(reference, timed)
        started = time.perf_counter()
        for text, given in zip(timed, answers, strict=True):
            states = torch.zeros(text.positions, reference.architecture.hidden_size)
            divergence(reference.logits(states), given, text.targets)
        per_position += (time.perf_counter() - started + blocks) / positions
        fixed = read
    return Rates(threads=threads, per_position=per_position, bundle_per_position=bundle, fixed=fixed)


def _original_seconds(reference: Reference, texts: Sequence[EvaluationText]) -> tuple[float, float]:
    """Return the seconds to read all blocks, and to run ``texts`` through all of them."""
    read = run = 0.0
    kinds = {len(layer.linears): layer for layer in reference.architecture.layers}
    for linears, layer in kinds.items():
        alike = sum(len(other.linears) == linears for other in reference.architecture.layers)
        started = time.perf_counter()
        block = reference.block(layer)
        read += alike * (time.perf_counter() - started)
        hidden = [reference.embed(text.ids)[None] for text in texts]
        block.forward(hidden[0], reference.position_embeddings(hidden[0].shape[1]))
        started = time.perf_counter()
        for states in hidden:
            block.forward(states, reference.position_embeddings(states.shape[1]))
        run += alike * (time.perf_counter() - started)
    return read, run
