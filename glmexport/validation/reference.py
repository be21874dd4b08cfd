"""The original's answers, computed one decoder block at a time, so that no machine is too small to ask it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

from glmexport.architecture import Reference
from glmexport.architecture.reference import Substitute
from glmexport.progress import Progress
from glmexport.validation.texts import EvaluationText


class ReferenceStates:
    """Hidden states of every text after the final norm, kept in a file without a name.

    ``states(index)`` is [positions, hidden] fp32: row i predicts the text's token ``prefix`` + i.
    """

    def __init__(self, texts: Sequence[EvaluationText], hidden_size: int, directory: Path) -> None:
        self.texts = texts
        self.hidden_size = hidden_size
        self._file = TemporaryFile(dir=directory)  # noqa: SIM115 - lives as long as this object
        weakref.finalize(self, self._file.close)
        self._offsets = np.cumsum([0, *(len(text.ids) * hidden_size * 4 for text in texts)]).tolist()

    def load(self, index: int) -> Tensor:
        """Whole sequence of text ``index``, [1, length, hidden]."""
        self._file.seek(self._offsets[index])
        count = self._offsets[index + 1] - self._offsets[index]
        buffer = bytearray(self._file.read(count))
        return torch.frombuffer(buffer, dtype=torch.float32).reshape(1, -1, self.hidden_size)

    def save(self, index: int, states: Tensor) -> None:
        """Replace the sequence of text ``index``."""
        self._file.seek(self._offsets[index])
        self._file.write(states.contiguous().numpy().data.cast("B"))

    def states(self, index: int) -> Tensor:
        """Rows that predict the judged tokens of text ``index``."""
        text = self.texts[index]
        return self.load(index)[0, text.prefix - 1 : -1]


def reference_states(
    reference: Reference,
    texts: Sequence[EvaluationText],
    directory: Path,
    progress: Progress,
    *,
    label: str = "Original, block by block",
    substitute: Substitute | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
) -> ReferenceStates:
    """Run the original over ``texts``; with ``substitute`` and ``embed``, with weights of theirs in its place."""
    states = ReferenceStates(texts, reference.architecture.hidden_size, directory)
    embedded = (embed or reference.embed)(torch.cat([text.ids for text in texts]))
    start = 0
    for index, text in enumerate(texts):
        states.save(index, embedded[None, start : start + len(text.ids)])
        start += len(text.ids)
    del embedded
    positions = {len(text.ids): reference.position_embeddings(len(text.ids)) for text in texts}
    with progress.track(label, len(reference.architecture.layers)) as track:
        for layer in reference.architecture.layers:
            block = reference.block(layer, substitute)
            for index, text in enumerate(texts):
                states.save(index, block.forward(states.load(index), positions[len(text.ids)]))
            track.advance()
    for index in range(len(texts)):
        states.save(index, reference.final_norm(states.load(index)))
    return states
