"""Texts that both models are asked about, in batches that ranks share and that are kept once they are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from glmexport.foundation.progress import Progress
from glmexport.quantization.ranks import Parcel
from glmexport.reference.reference import Reference
from glmexport.results.fidelity import LanguageFidelity
from glmexport.validation.divergence import Divergence
from glmexport.validation.fidelity import Answers, Streamed, compare_texts, statistics_of
from glmexport.validation.noise import NOISE, RepeatedStates, TextBatch, consecutive, repeated_states, text_batches
from glmexport.validation.pieces import Pieces
from glmexport.validation.texts import EvaluationText, text_digest

_WALK = "original"
#: Number of tensors of a divergence.
_FIELDS = 7


class SharedTexts:
    """The original's states of ``texts``, of those at the places ``sample`` twice, and what is compared with them.

    Each rank takes its own batches through the blocks, when the first of them is asked for.
    """

    def __init__(
        self,
        reference: Reference,
        texts: Sequence[EvaluationText],
        sample: Sequence[int],
        *,
        threads: int,
        pieces: Pieces,
        scratch: Path,
        progress: Progress,
        label: str = "Original, block by block",
    ) -> None:
        self.reference = reference
        self._texts, self._pieces = texts, pieces
        self._threads, self._scratch, self._progress, self._label = threads, scratch, progress, label
        self._batches = text_batches(texts, sample, routed=bool(reference.architecture.routed))
        self._names = [[batch.again, text_digest(self._of(batch))] for batch in self._batches]

    @property
    def repeated(self) -> list[int]:
        """The indices of the batches that are run twice, which are the first."""
        return [index for index, batch in enumerate(self._batches) if batch.again]

    def name(self, index: int) -> str:
        """Return what the numbers of a batch depend on."""
        return str(self._names[index][1])

    def texts(self, index: int) -> list[EvaluationText]:
        """Return the texts of a batch."""
        return self._of(self._batches[index])

    def original(self, index: int) -> Streamed:
        """Return the original's answers to a batch that this rank owns."""
        return Streamed(self.runs.states.only(self._places[index]), self.reference)

    def routes(self, index: int) -> dict[int, Tensor]:
        """Return the experts by layer to which the second run sends the positions of a batch that this rank owns."""
        rows = [sum(len(text.ids) for text in self.texts(own)) for own in self._own if self._batches[own].again]
        span = consecutive(rows)[self._own.index(index)]
        return {layer: experts[span.start : span.stop] for layer, experts in self.runs.routes.layers.items()}

    def divergences(self, answers: Callable[[Sequence[EvaluationText]], Answers], label: str) -> list[Divergence]:
        """Return the divergence of every text; ``answers`` gives the bundle's to the texts that it is given."""

        def compute(absent: Sequence[int]) -> Iterator[tuple[int, Parcel]]:
            # The pass through the blocks comes first.
            originals = [self.original(index) for index in absent]
            with self._progress.track(label, sum(len(each.texts) for each in originals)) as track:
                for index, original in zip(absent, originals, strict=True):
                    yield index, _parcel(compare_texts(original, answers(original.texts), track))

        parcels = self._pieces.each("divergences", self._names, compute)
        found: dict[int, Divergence] = {}
        for batch, parcel in zip(self._batches, parcels, strict=True):
            found |= zip(batch.places, _divergences(parcel), strict=True)
        return [found[place] for place in range(len(self._texts))]

    def noise(self) -> LanguageFidelity:
        """Return how far the two runs of the original are apart."""
        repeated = self.repeated

        def compute(absent: Sequence[int]) -> Iterator[tuple[int, Parcel]]:
            spans = {index: self._places[index] for index in self._own if self._batches[index].again}
            sample = [place for span in spans.values() for place in span]
            with self._progress.track(NOISE, sum(len(spans[index]) for index in absent)) as track:
                for index in absent:
                    places = [sample.index(place) for place in spans[index]]
                    yield index, _parcel(self.runs.compare(places, track))

        parcels = self._pieces.each("noise", [self._names[index] for index in repeated], compute)
        return statistics_of("all", [each for parcel in parcels for each in _divergences(parcel)])

    def forget(self) -> None:
        """Remove this rank's pass through the blocks, of which nothing else is asked."""
        self._pieces.drop_walk(_WALK, self._walked)

    @cached_property
    def runs(self) -> RepeatedStates:
        """The states of all batches that this rank owns, one after the other."""
        own = [self._batches[index] for index in self._own]
        return repeated_states(
            self.reference,
            [text for batch in own for text in self._of(batch)],
            [TextBatch(tuple(self._places[index]), self._batches[index].again) for index in self._own],
            self._threads,
            self._scratch,
            self._progress,
            label=self._label,
            kept=self._pieces.walk(_WALK, self._walked),
        )

    @property
    def _own(self) -> Sequence[int]:
        return self._pieces.ranks.own(range(len(self._batches)))

    @property
    def _places(self) -> dict[int, range]:
        """The places of each own batch's texts among all own texts."""
        spans = consecutive([len(self._batches[index].places) for index in self._own])
        return dict(zip(self._own, spans, strict=True))

    @property
    def _walked(self) -> list[object]:
        return [self._names[index] for index in self._own]

    def _of(self, batch: TextBatch) -> list[EvaluationText]:
        return [self._texts[place] for place in batch.places]


def _parcel(divergences: Sequence[Divergence]) -> Parcel:
    return Parcel(tuple(tensor for each in divergences for tensor in each.tensors))


def _divergences(parcel: Parcel) -> Iterator[Divergence]:
    for start in range(0, len(parcel.tensors), _FIELDS):
        fields = [tensor for tensor in parcel.tensors[start : start + _FIELDS] if tensor is not None]
        yield Divergence(*fields)
