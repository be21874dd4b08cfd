"""Successive halving over the legal candidates: little time for many of them, more for those that are left.

1. Each has two rounds: the faster half of every class of equal numerics goes on.
2. Each has as many rounds as bounds take: the fastest of each class goes on, unless another class surely beats it.
3. Each has rounds for the time given: they decide the front and the choice.
4. The choice has further rounds that took no part in choosing: the best of many is in part the luckiest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from glmexport.foundation.errors import MachineError
from glmexport.foundation.evidence import CandidateSettings, Divergences, Gains, Outcome, Preference
from glmexport.foundation.progress import Progress
from glmexport.quantization.store import WorkDirectory
from glmexport.tuning.candidates import Numerics, identity, label, numerics
from glmexport.tuning.measure import Pair, Side, as_numbers, from_numbers, gains_of, take_pairs
from glmexport.tuning.pareto import Timed, better_half, contenders, front, pick
from glmexport.validation.speed import LEAST_ROUNDS

_FEW_ROUNDS = 2

#: A function that loads a candidate.
Load = Callable[[CandidateSettings], Side]


@dataclass(frozen=True)
class Fate:
    """The fate of a candidate: its measurements, and the reason why it was dropped."""

    outcome: Outcome
    reason: str
    gains: Gains | None = None


@dataclass
class Search:
    """A search whose measurements are committed to ``work`` one by one, and read from there by a later run."""

    start: CandidateSettings
    load: Load
    divergences: Mapping[Numerics, Divergences]
    work: WorkDirectory
    prefer: Preference
    confidence: float
    #: Seconds of the rounds of a finalist.
    seconds: float
    progress: Progress
    #: The fate of each candidate that was timed, by identity.
    fates: dict[str, Fate] = field(default_factory=dict)

    def choose(self, legal: Sequence[CandidateSettings], *, start_is_legal: bool) -> tuple[Timed | None, Gains | None]:
        """Return the choice among ``legal`` and its speed in further rounds; None: the start stays.

        ``legal`` is without the start.
        """
        first = self._timed("first", legal, _FEW_ROUNDS, 0)
        speeds = {identity(each.settings): (numerics(each.settings), each.speed) for each in first}
        hopeful = set(better_half(speeds))
        self._drop(first, [each for each in first if identity(each.settings) in hopeful], "slower in its class")
        second = self._timed("second", _settings(first, hopeful), LEAST_ROUNDS, 0)
        finalists = contenders(second)
        self._drop(second, finalists, "slower than another that diverges no more")
        final = self._timed("final", [each.settings for each in finalists], LEAST_ROUNDS, self.seconds)
        best = front(final)
        for each in final:
            outcome: Outcome = "front" if each in best else "beaten"
            self._note(each, outcome, "none is both faster and less divergent" if each in best else "another is both")
        chosen = pick(final, start_is_legal=start_is_legal)
        if chosen is None:
            return None, None
        (confirmed,) = self._timed("confirm", [chosen.settings], LEAST_ROUNDS, self.seconds)
        if start_is_legal and not confirmed.gains.preferred.sure:
            self._note(chosen, "front", "seemed faster, and was not surely so in rounds of its own")
            return None, confirmed.gains
        self._note(chosen, "chosen", "the fastest, or the least divergent that cannot be told from it")
        return chosen, confirmed.gains

    def _timed(self, stage: str, settings: Sequence[CandidateSettings], rounds: int, seconds: float) -> list[Timed]:
        """Return times of those ``settings`` that run here, each beside the start, which is loaded once for all."""
        timed = []
        with ExitStack() as stack, self.progress.track(f"Speed: {stage} turns", len(settings)) as track:
            start: Side | None = None
            for each in settings:
                step = f"{stage}-{hashlib.sha256(identity(each).encode()).hexdigest()[:16]}"
                record = self.work.record(step)
                if record is None:
                    start = start or stack.enter_context(self.load(self.start))
                    pairs = self._pairs(start, each, rounds, seconds)
                    if pairs:
                        self.work.commit(step, {}, {"pairs": as_numbers(pairs)})
                else:
                    pairs = from_numbers(record["note"]["pairs"])
                if pairs:
                    gains = gains_of(pairs, self.prefer, self.confidence)
                    timed.append(Timed(each, gains, self.divergences[numerics(each)]))
                track.advance(1, label(each))
        return timed

    def _pairs(self, start: Side, settings: CandidateSettings, rounds: int, seconds: float) -> list[Pair]:
        """Return the rounds; None where the candidate does not run, which does not end the search."""
        try:
            candidate = self.load(settings)
        except MachineError as error:
            self.progress.remark(f"{label(settings)} does not run here: {error.message}")
            self.fates[identity(settings)] = Fate("illegal", f"does not run here: {error.message}")
            return []
        with candidate:
            return take_pairs(start, candidate, rounds, seconds)

    def _drop(self, before: Sequence[Timed], after: Sequence[Timed], reason: str) -> None:
        for each in before:
            if each not in after:
                self._note(each, "beaten", reason)

    def _note(self, timed: Timed, outcome: Outcome, reason: str) -> None:
        self.fates[identity(timed.settings)] = Fate(outcome, reason, timed.gains)


def _settings(timed: Sequence[Timed], kept: set[str]) -> list[CandidateSettings]:
    return [each.settings for each in timed if identity(each.settings) in kept]
