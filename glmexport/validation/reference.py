"""The original's answers, computed one decoder block at a time, so that no machine is too small to ask it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from glmexport.foundation.progress import Progress
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.reference import Block, Reference
from glmexport.validation.routing import Routes
from glmexport.validation.texts import EvaluationText

_STATES = "states"
#: Positions that routed experts see together: enough that computing takes longer than reading the experts.
_TOGETHER = 1 << 13


class ReferenceStates:
    """Hidden states of every text after the final norm, kept in a file without a name.

    ``states(index)`` is [positions, hidden] fp32: row i predicts the text's token ``prefix`` + i.
    """

    def __init__(self, texts: Sequence[EvaluationText], hidden_size: int, directory: Path) -> None:
        self.texts = texts
        self.hidden_size = hidden_size
        #: Keeps the file open for those that were chosen from it.
        self._whole: ReferenceStates | None = None
        self._file = TemporaryFile(dir=directory)  # noqa: SIM115 - lives as long as this object
        weakref.finalize(self, self._file.close)
        self._offsets = np.cumsum([0, *(len(text.ids) * hidden_size * 4 for text in texts)])[:-1].tolist()

    def only(self, indices: Sequence[int]) -> ReferenceStates:
        """Those of some of the texts, in the same file."""
        chosen = copy.copy(self)
        chosen.texts = [self.texts[index] for index in indices]
        chosen._offsets = [self._offsets[index] for index in indices]
        chosen._whole = self
        return chosen

    def load(self, index: int) -> Tensor:
        """Whole sequence of text ``index``, [1, length, hidden]."""
        self._file.seek(self._offsets[index])
        buffer = bytearray(self._file.read(len(self.texts[index].ids) * self.hidden_size * 4))
        return torch.frombuffer(buffer, dtype=torch.float32).reshape(1, -1, self.hidden_size)

    def save(self, index: int, states: Tensor) -> None:
        """Replace the sequence of text ``index``."""
        self._file.seek(self._offsets[index])
        self._file.write(states.contiguous().numpy().data.cast("B"))

    def states(self, index: int) -> Tensor:
        """Rows that predict the judged tokens of text ``index``."""
        text = self.texts[index]
        return self.load(index)[0, text.prefix - 1 : -1]


class _Selections:
    """What the tokens of each batch attend to, from a layer that chose it to those that share it, in a file.

    Of batches no longer than ``attended`` nothing is kept: there a token attends to all.
    """

    def __init__(self, directory: Path, attended: int | None) -> None:
        self._attended = attended
        self._file = TemporaryFile(dir=directory)  # noqa: SIM115 - lives as long as this object
        weakref.finalize(self, self._file.close)
        self._places: dict[int, tuple[int, torch.Size]] = {}
        self._end = 0

    def load(self, batch: int) -> Tensor | None:
        """[sequences, length, chosen] int32, or None."""
        if batch not in self._places:
            return None
        offset, shape = self._places[batch]
        self._file.seek(offset)
        return torch.frombuffer(bytearray(self._file.read(4 * shape.numel())), dtype=torch.int32).reshape(shape)

    def save(self, batch: int, selection: Tensor | None) -> None:
        """Replace that of the batch, whose shape stays the same."""
        if selection is None or self._attended is None or selection.shape[1] <= self._attended:
            return
        offset, _ = self._places.setdefault(batch, (self._end, selection.shape))
        self._end = max(self._end, offset + 4 * selection.numel())
        self._file.seek(offset)
        self._file.write(selection.int().cpu().contiguous().numpy().data.cast("B"))


def reference_states(
    reference: Reference,
    texts: Sequence[EvaluationText],
    directory: Path,
    progress: Progress,
    *,
    label: str = "Original, block by block",
    batch: int = 1,
    kept: WorkDirectory | None = None,
    routes: Routes | None = None,
) -> ReferenceStates:
    """Run the original over ``texts``, one block in memory at a time, and return its states behind the final norm.

    ``batch`` texts at a time, the shorter ones padded behind their end, where a causal model does not look. Each
    finished block is committed to ``kept``, where the next call with the same texts goes on. What experts every
    position is sent to is added to ``routes``.
    """
    states = ReferenceStates(texts, reference.architecture.hidden_size, directory)
    layers = reference.architecture.layers
    finished = _resume(states, kept, len(layers)) if kept else 0
    if not finished:
        embedded = reference.embed(torch.cat([text.ids for text in texts]))
        for index, rows in enumerate(torch.split(embedded, [len(text.ids) for text in texts])):
            states.save(index, rows[None])
        del embedded
    lengths = {len(text.ids) for text in texts}
    positions = {length: reference.position_embeddings(length) for length in lengths}
    selections = _Selections(directory, reference.architecture.attended_tokens)
    committed = finished
    with progress.track(label, len(layers)) as track:
        track.advance(finished)
        for index, layer in enumerate(layers[finished:], finished + 1):
            block = reference.block(layer)
            routed = bool(layer.mlp.routed)
            for start in range(0, len(texts), batch):
                group = range(start, min(start + batch, len(texts)))
                longest = max(len(texts[text].ids) for text in group)
                padded = [pad(states.load(text), (0, 0, 0, longest - len(texts[text].ids))) for text in group]
                run = block.attended if routed else block.selecting
                outputs, selection = run(torch.cat(padded), positions[longest], selections.load(start))
                selections.save(start, selection)
                for text, output in zip(group, outputs, strict=True):
                    states.save(text, output[: len(texts[text].ids)])
            if routed:
                _through_experts(block, states, routes)
            # What is behind a block that goes on with the selection of this one is not enough to resume from.
            if kept and not (index < len(layers) and layers[index].attention.shared_selection):
                kept.commit(_step(layer.index), {}, {}, {_STATES: (states.load(i) for i in range(len(texts)))})
                kept.forget(_step(committed - 1))
                committed = index
            track.advance()
    for index in range(len(texts)):
        states.save(index, reference.final_norm(states.load(index)))
    return states


def _through_experts(block: Block, states: ReferenceStates, routes: Routes | None) -> None:
    """Take texts that are behind a block's attention through its experts, many of them at a time."""
    waiting: list[int] = []
    lengths = [len(text.ids) for text in states.texts]
    for index in range(len(lengths)):
        waiting.append(index)
        if index + 1 < len(lengths) and sum(lengths[i] for i in waiting) + lengths[index + 1] <= _TOGETHER:
            continue
        rows = torch.cat([states.load(i) for i in waiting], 1)
        branch = block.layer.branches[1]
        if routes is not None:
            experts, _ = block.route(block.normed(branch, rows).flatten(0, 1))
            routes.add(block.layer.index, experts)
        outputs = block.through(branch, rows)
        for i, output in zip(waiting, torch.split(outputs, [lengths[i] for i in waiting], 1), strict=True):
            states.save(i, output)
        waiting = []


def _step(layer: int) -> str:
    return f"{_STATES}-{layer:03}"


def _resume(states: ReferenceStates, kept: WorkDirectory, layers: int) -> int:
    """Read the states behind the last block that was committed; the number of finished blocks."""
    for finished in range(layers, 0, -1):
        step = _step(finished - 1)
        if kept.record(step) is not None and kept.has_activations(step, _STATES):
            rows = sum(len(text.ids) for text in states.texts)
            stored = kept.activations(step, _STATES, (rows, 1, states.hidden_size))
            start = 0
            for index, text in enumerate(states.texts):
                stop = start + len(text.ids)
                states.save(index, stored.read(start, stop).transpose(0, 1))
                start = stop
            return finished
    return 0
