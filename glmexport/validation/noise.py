"""The original compared with itself: how far two runs of one model are apart by the order of their arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from glmexport.foundation.progress import Progress, Track
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.reference import Reference
from glmexport.results.fidelity import LanguageFidelity
from glmexport.validation.divergence import Divergence
from glmexport.validation.fidelity import Streamed, compare_texts, statistics_of
from glmexport.validation.reference import ReferenceStates, TextStream, pass_together
from glmexport.validation.routing import Routes
from glmexport.validation.texts import EvaluationText

#: The label of the progress of comparing both runs.
NOISE = "Original against itself"
#: Number of texts at a time in the second run; in the first it is one.
_OTHER_BATCH = 4
#: Most tokens of a batch of texts: few, so that ranks can share them; where experts are read for them, as many as make
#: that worth it.
_BATCH_TOKENS, _ROUTED_BATCH_TOKENS = 1 << 10, 1 << 13


@dataclass(frozen=True)
class TextBatch:
    """Texts, by their ``places``, that one rank takes through the blocks; no number depends on what else it takes."""

    places: tuple[int, ...]
    #: Whether they are run once more.
    again: bool = False


def batch_tokens(*, routed: bool) -> int:
    """Return the most tokens of a batch of texts, for an original with ``routed`` experts or without."""
    return _ROUTED_BATCH_TOKENS if routed else _BATCH_TOKENS


def text_batches(texts: Sequence[EvaluationText], sample: Sequence[int], *, routed: bool) -> list[TextBatch]:
    """Return all ``texts`` in batches, which do not depend on the number of ranks.

    Args:
        texts: what the original is asked about.
        sample: the places of those that are run twice; their batches come first.
        routed: whether the original has routed experts.
    """
    most = batch_tokens(routed=routed)
    again = _cut(texts, [sample[start : start + _OTHER_BATCH] for start in range(0, len(sample), _OTHER_BATCH)], most)
    once = _cut(texts, [[place] for place in range(len(texts)) if place not in set(sample)], most)
    return [TextBatch(places, True) for places in again] + [TextBatch(places) for places in once]


def _cut(
    texts: Sequence[EvaluationText], units: Sequence[Sequence[int]], most: int
) -> list[tuple[int, ...]]:
    """Return whole ``units`` of places together, up to ``most`` tokens; a unit that has more is alone."""
    found: list[list[int]] = []
    room = 0
    for unit in units:
        tokens = sum(len(texts[place].ids) for place in unit)
        if not found or tokens > room:
            found.append([])
            room = most
        found[-1] += unit
        room -= tokens
    return [tuple(places) for places in found]


@dataclass(frozen=True)
class RepeatedStates:
    """The original's states of texts, and once more those of a sample of them, in other batches and threads."""

    reference: Reference
    states: ReferenceStates
    #: The first run's states of the sample.
    sample: ReferenceStates
    again: ReferenceStates
    #: The experts that the second run sends every position of the sample to, in its order.
    routes: Routes

    def noise(self, progress: Progress) -> LanguageFidelity:
        """Compare both runs over the sample; the two are the same model."""
        with progress.track(NOISE, len(self.sample.texts)) as track:
            return statistics_of("all", self.compare(range(len(self.sample.texts)), track))

    def compare(self, places: Sequence[int], track: Track) -> list[Divergence]:
        """Return the divergences of both runs over those texts of the sample."""
        again = self.again.only(places)

        def answers(index: int) -> Tensor:
            return self.reference.logits(again.states(index))

        return compare_texts(Streamed(self.sample.only(places), self.reference), answers, track)


def repeated_states(
    reference: Reference,
    texts: Sequence[EvaluationText],
    batches: Sequence[TextBatch],
    threads: int,
    scratch: Path,
    progress: Progress,
    *,
    label: str = "Original, block by block",
    kept: WorkDirectory | None = None,
) -> RepeatedStates:
    """Run the original over ``texts``, all of which are in ``batches``, and over some of them once more.

    Both runs pass each block while it is in memory, so that the checkpoint is read once. The first is computed in
    ``threads``, which are set already, and the second in half as many. Finished blocks are committed to ``kept``,
    where the next call with the same texts goes on.
    """
    sample = [place for batch in batches if batch.again for place in batch.places]
    first = TextStream(reference, texts, scratch, groups=[batch.places for batch in batches])
    streams = [first]
    if sample:
        sizes = [len(batch.places) for batch in batches if batch.again]
        second = TextStream(
            reference,
            [texts[index] for index in sample],
            scratch,
            batch=_OTHER_BATCH,
            threads=threads // 2 if threads > 1 else 2,
            routes=Routes(),
            groups=consecutive(sizes),
        )
        streams.append(second)
    states = pass_together(reference, streams, progress, label, kept)
    return RepeatedStates(
        reference,
        states[0],
        states[0].only(sample),
        states[-1].only(range(len(sample))),
        streams[-1].routes or Routes(),
    )


def consecutive(sizes: Sequence[int]) -> list[range]:
    """Return ranges of so many numbers each, one behind the other from 0 on."""
    ranges, start = [], 0
    for size in sizes:
        ranges.append(range(start, start + size))
        start += size
    return ranges
