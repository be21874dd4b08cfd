"""The choice among timed candidates: those worth more time, those that none beats in both measures, the best one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glmexport.foundation.evidence import CandidateSettings, Deviation, Divergences, Gains
from glmexport.tuning.candidates import Numerics, numerics

#: Share of the speed of the fastest in its class that a candidate must have after the first few rounds.
_HOPEFUL = 0.5


@dataclass(frozen=True)
class Timed:
    """A candidate with its measurements."""

    settings: CandidateSettings
    gains: Gains
    divergence: Divergences

    @property
    def speed(self) -> float:
        """The preferred speed, over that of the start."""
        return self.gains.preferred.ratio


def too_divergent(
    given: Divergences, start: Divergences, allowance: float, *, calibrated_limit: float | None = None
) -> str | None:
    """Return why a candidate may not be taken, whatever its speed; None if it may.

    1. Its arithmetic may move its own weights by ``allowance`` at most: in the worst language as measured, over all
       of them with the upper bound.
    2. Its formats may diverge by ``allowance`` more than those of the start in fp32 arithmetic, in any language.
    3. Where the weights are those that would be shipped, its divergence must be within the gate.

    Args:
        given: the divergences of the candidate.
        start: those of the start's weights in fp32 arithmetic.
        allowance: nats per token.
        calibrated_limit: the gate on the mean divergence, where the weights are calibrated.
    """
    moved = given.arithmetic
    if _above(moved, allowance):
        return (
            f"its arithmetic moves its own weights by {moved.worst:.3g} nats in {moved.language} "
            f"({moved.mean:.3g} over all), above the allowance of {allowance:.3g}"
        )
    more = given.original.worst - start.original.worst
    if not more <= allowance:
        beyond = f"above the allowance of {allowance:.3g}"
        return f"it diverges by {more:.3g} nats more than the start's formats do, {beyond}"
    if calibrated_limit is not None and not given.original.worst <= calibrated_limit:
        return (
            f"it diverges by {given.original.worst:.3g} nats in {given.original.language}, above the gate of "
            f"{calibrated_limit:g}"
        )
    return None


def _above(deviation: Deviation, limit: float) -> bool:
    """Return whether ``deviation`` is above ``limit``; one that is not a number is above every limit."""
    over_all = deviation.mean if deviation.upper is None else deviation.upper
    return not (deviation.worst <= limit and over_all <= limit)


def better_half(speeds: Mapping[str, tuple[Numerics, float]]) -> list[str]:
    """Return the faster half of each class of equal numerics, rounded up, in the order given.

    Within a class only speed counts, so that a few rounds can tell which candidates are hopeless. A candidate of less
    than half the speed of the fastest in its class goes in any case.
    """
    kept: set[str] = set()
    classes: dict[Numerics, list[str]] = {}
    for name, (kind, _) in speeds.items():
        classes.setdefault(kind, []).append(name)
    for names in classes.values():
        ranked = sorted(names, key=lambda name: -speeds[name][1])
        fastest = speeds[ranked[0]][1]
        half = ranked[: -(-len(ranked) // 2)]
        kept |= {name for name in half if speeds[name][1] >= _HOPEFUL * fastest}
    return [name for name in speeds if name in kept]


def contenders(timed: Sequence[Timed]) -> list[Timed]:
    """Return the fastest of each class of equal numerics, without those that another one surely beats.

    One surely beats another if it diverges no more, and its lower bound of speed is above the upper bound of the beaten
    one.
    """
    best: dict[Numerics, Timed] = {}
    for each in timed:
        kind = numerics(each.settings)
        if kind not in best or each.speed > best[kind].speed:
            best[kind] = each
    return [each for each in best.values() if not any(_surely_beats(other, each) for other in best.values())]


def _surely_beats(one: Timed, other: Timed) -> bool:
    lower, upper = one.gains.preferred.lower, other.gains.preferred.upper
    if lower is None or upper is None or one.divergence.original.mean > other.divergence.original.mean:
        return False
    return lower > upper


def front(timed: Sequence[Timed]) -> list[Timed]:
    """Return those for which no other is both faster and at most as divergent, the fastest first."""
    ranked = sorted(timed, key=lambda each: (-each.speed, each.divergence.original.mean))
    kept: list[Timed] = []
    for each in ranked:
        if not kept or each.divergence.original.mean < kept[-1].divergence.original.mean:
            kept.append(each)
    return kept


def pick(timed: Sequence[Timed], *, start_is_legal: bool) -> Timed | None:
    """Return the least divergent of those that cannot be told from the fastest. None: the start stays.

    The start stays where it is legal and even the fastest does not surely gain.
    """
    if not timed:
        return None
    fastest = max(timed, key=lambda each: each.speed)
    if start_is_legal and not fastest.gains.preferred.sure:
        return None
    least = fastest.gains.preferred.lower
    near = [
        each
        for each in timed
        if each.speed >= (fastest.speed if least is None else least)
        and (each.gains.preferred.sure or not start_is_legal)
    ]
    return min(near, key=lambda each: (each.divergence.original.mean, -each.speed))
