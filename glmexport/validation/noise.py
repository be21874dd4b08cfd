"""The original compared with itself: how far two runs of one model are apart by the order of their arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from glmexport.foundation.progress import Progress
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.reference import Reference
from glmexport.results.fidelity import LanguageFidelity
from glmexport.validation.fidelity import Streamed, compare, statistics_of
from glmexport.validation.reference import ReferenceStates, TextStream, pass_together
from glmexport.validation.routing import Routes
from glmexport.validation.texts import EvaluationText

#: Number of texts at a time in the second run; in the first it is one.
_OTHER_BATCH = 4


@dataclass(frozen=True)
class RepeatedStates:
    """The original's states of texts, and once more those of a sample of them, in other batches and threads."""

    reference: Reference
    states: ReferenceStates
    #: The first run's states of the sample.
    sample: ReferenceStates
    again: ReferenceStates

    def noise(self, progress: Progress) -> LanguageFidelity:
        """Compare both runs over the sample; the two are the same model."""

        def answers(index: int) -> Tensor:
            return self.reference.logits(self.again.states(index))

        original = Streamed(self.sample, self.reference)
        return statistics_of("all", compare(original, answers, progress, "Original against itself"))


def repeated_states(
    reference: Reference,
    texts: Sequence[EvaluationText],
    sample: Sequence[int],
    threads: int,
    scratch: Path,
    progress: Progress,
    *,
    label: str = "Original, block by block",
    routes: Routes | None = None,
    kept: WorkDirectory | None = None,
) -> RepeatedStates:
    """Run the original over ``texts``, and over those of the indices ``sample`` once more.

    Both runs pass each block while it is in memory, so that the checkpoint is read once. The first is computed in
    ``threads``, which are set already, and the second in half as many. The experts that it sends every position to are
    added to ``routes``. Finished blocks are committed to ``kept``, where the next call with the same texts goes on.
    """
    first = TextStream(reference, texts, scratch)
    second = TextStream(
        reference,
        [texts[index] for index in sample],
        scratch,
        batch=_OTHER_BATCH,
        threads=threads // 2 if threads > 1 else 2,
        routes=routes,
    )
    states, again = pass_together(reference, [first, second], progress, label, kept)
    return RepeatedStates(reference, states, states.only(sample), again)
