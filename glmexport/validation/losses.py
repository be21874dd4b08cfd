"""The losses of a bundle's answers against the original's, as quantities that have to be small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

from glmexport.foundation.target import BehaviourLimits
from glmexport.results.behaviour import Behaviour
from glmexport.results.fidelity import Estimate
from glmexport.results.paired import Paired
from glmexport.validation.behaviour.paired import loss_chance
from glmexport.validation.statistics import documents_needed

#: Most losses that ``losses`` yields, beside one a group of the user's tasks.
MOST_LOSSES = 7


@dataclass(frozen=True)
class Loss:
    """One limit: the value found, its bounds, and a chance.

    The true value is beyond each bound in one case of 1 / (1 - confidence). The chance is that of a value this large or
    larger if the true one were the limit.
    """

    name: str
    value: float
    limit: float
    unit: str
    lower: float
    upper: float
    p_value: float
    sample: str
    #: The noun by which the sample is counted.
    noun: str
    #: About how large a sample would decide in four of five cases, if the value is the true one; None if unknown.
    needed: int | None


def losses(behaviour: Behaviour, limits: BehaviourLimits, confidence: float) -> Iterator[Loss]:
    """Return every loss that the plane of behaviour judges, over all languages: single ones have too few answers."""
    yield _length(behaviour, limits.length_ratio, confidence)
    shares = {
        "More answers that end in a loop": behaviour.loops,
        "More answers that do not end": behaviour.ended,
        "Answers in another language": behaviour.drift,
        "Tool calls lost": behaviour.tool_calls,
        "Tool calls lost in a batch": behaviour.tool_calls_together,
    }
    for name, change in shares.items():
        if change is not None:
            yield _loss(name, change, limits.answers, "share", "answers")
    if behaviour.translation is not None:
        yield _loss("chrF of translations lost", behaviour.translation, limits.chrf, "", "sentences")
    for group in behaviour.tasks:
        yield _loss(f"Score lost in {group.name} ({group.metric})", group.change, limits.tasks, "share", "tasks")


def _length(behaviour: Behaviour, most: float, confidence: float) -> Loss:
    """Return the loss of the logarithm of the ratio of lengths, which has to be small in either direction."""
    ratio, error = behaviour.ln_length_ratio, behaviour.ln_length_ratio_error
    freedom = behaviour.overall.answers - 1
    reach = float(stdtrit(freedom, confidence)) * error if math.isfinite(error) else math.inf
    ends = abs(ratio - reach), abs(ratio + reach)
    limit = math.log1p(most)
    return Loss(
        "ln of lengths of answers, bundle / original",
        abs(ratio),
        limit,
        "",
        0.0 if abs(ratio) <= reach else min(ends),
        max(ends),
        _beyond(abs(ratio) - limit, error, freedom) + _beyond(abs(ratio) + limit, error, freedom),
        f"{behaviour.overall.answers} answers, {behaviour.overall.tokens_original} tokens of the original",
        "answers",
        _needed(abs(ratio), error, behaviour.overall.answers, limit, confidence),
    )


def _loss(name: str, change: Paired, limit: float, unit: str, noun: str) -> Loss:
    return Loss(
        name,
        0.0 - change.mean_difference,
        limit,
        unit,
        -change.upper_bound,
        -change.lower_bound,
        loss_chance(change, limit),
        f"{change.tasks} {noun}, {change.lost} lost and {change.gained} gained",
        noun,
        _needed(-change.mean_difference, change.standard_error, change.tasks, limit, change.confidence),
    )


def _needed(loss: float, error: float, count: int, limit: float, confidence: float) -> int | None:
    """Return the sample that would decide, by Student's distribution.

    It is no smaller than one that shows, if nothing in it changes, that little does.
    """
    found = Estimate(value=loss, standard_error=error, documents=count, positions=count, kind="signed")
    needed = documents_needed(found, limit, confidence)
    return needed and max(needed, math.ceil(math.log(1 - confidence) / math.log1p(-limit)), count + 1)


def _beyond(distance: float, error: float, freedom: int) -> float:
    """Return the chance of ``distance`` by Student's distribution; one half where a single answer says nothing."""
    if not math.isfinite(error):
        return 0.5
    if error == 0:
        return 0.0 if distance > 0 else 0.5
    return float(stdtr(freedom, -distance / error))
