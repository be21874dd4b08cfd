"""The original's answers, computed one decoder block at a time, so that no machine is too small to ask it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Protocol

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
#: Number of positions that routed experts see together: enough that computing takes longer than reading the experts.
_TOGETHER = 1 << 13


class ReferenceStates:
    """Hidden states of every text after the final norm, kept in a file without a name.

    ``states(index)`` is [positions, hidden] fp32: row i predicts the text's token ``prefix`` + i.
    """

    def __init__(self, texts: Sequence[EvaluationText], hidden_size: int, directory: Path) -> None:
        self.texts = texts
        self.hidden_size = hidden_size
        #: The states that these were chosen from, whose file stays open as long as these live.
        self._whole: ReferenceStates | None = None
        self._file = TemporaryFile(dir=directory)  # noqa: SIM115 - lives as long as this object
        weakref.finalize(self, self._file.close)
        self._offsets = np.cumsum([0, *(len(text.ids) * hidden_size * 4 for text in texts)])[:-1].tolist()

    def only(self, indices: Sequence[int]) -> ReferenceStates:
        """Return the states of some of the texts, in the same file."""
        chosen = copy.copy(self)
        chosen.texts = [self.texts[index] for index in indices]
        chosen._offsets = [self._offsets[index] for index in indices]
        chosen._whole = self
        return chosen

    def load(self, index: int) -> Tensor:
        """Return the whole sequence of text ``index``, [1, length, hidden]."""
        self._file.seek(self._offsets[index])
        buffer = bytearray(self._file.read(len(self.texts[index].ids) * self.hidden_size * 4))
        return torch.frombuffer(buffer, dtype=torch.float32).reshape(1, -1, self.hidden_size)

    def save(self, index: int, states: Tensor) -> None:
        """Replace the sequence of text ``index``."""
        self._file.seek(self._offsets[index])
        self._file.write(states.contiguous().numpy().data.cast("B"))

    def each(self) -> Iterator[Tensor]:
        """Yield the whole sequence of every text, [1, length, hidden]."""
        return (self.load(index) for index in range(len(self.texts)))

    def embed(self, reference: Reference) -> None:
        """Replace every sequence by the embeddings of its tokens."""
        embed_together(reference, [self])

    def norm(self, reference: Reference) -> None:
        """Replace every sequence by what the final norm makes of it."""
        for index in range(len(self.texts)):
            self.save(index, reference.final_norm(self.load(index)))

    def states(self, index: int) -> Tensor:
        """Return the rows that predict the judged tokens of text ``index``."""
        text = self.texts[index]
        return self.load(index)[0, text.prefix - 1 : -1]


def embed_together(reference: Reference, each: Sequence[ReferenceStates]) -> None:
    """Replace every sequence by the embeddings of its tokens; the table is read once for all."""
    places = [(states, index) for states in each for index in range(len(states.texts))]
    ids = [states.texts[index].ids for states, index in places]
    embedded = reference.embed(torch.cat(ids))
    for (states, index), rows in zip(places, torch.split(embedded, list(map(len, ids))), strict=True):
        states.save(index, rows[None])


class Selections:
    """The positions that the tokens of each batch attend to, kept in a file for the layers that share a selection.

    Nothing is kept for batches shorter than ``attended``: there a token attends to all.
    """

    def __init__(self, directory: Path, attended: int | None) -> None:
        self._attended = attended
        self._file = TemporaryFile(dir=directory)  # noqa: SIM115 - lives as long as this object
        weakref.finalize(self, self._file.close)
        self._places: dict[int, tuple[int, torch.Size]] = {}
        self._end = 0

    def load(self, batch: int) -> Tensor | None:
        """Return the selection of a batch, [sequences, length, chosen] int32, or None."""
        if batch not in self._places:
            return None
        offset, shape = self._places[batch]
        self._file.seek(offset)
        return torch.frombuffer(bytearray(self._file.read(4 * shape.numel())), dtype=torch.int32).reshape(shape)

    def save(self, batch: int, selection: Tensor | None) -> None:
        """Replace the selection of the batch, whose shape stays the same."""
        if selection is None or self._attended is None or selection.shape[-1] < self._attended:
            return
        offset, _ = self._places.setdefault(batch, (self._end, selection.shape))
        self._end = max(self._end, offset + 4 * selection.numel())
        self._file.seek(offset)
        self._file.write(selection.int().cpu().contiguous().numpy().data.cast("B"))


class BlockStream(Protocol):
    """A stream of texts on their way through the blocks; each block is filled once for all streams that pass it."""

    def through(self, block: Block) -> None:
        """Take every text through ``block``."""


class TextStream:
    """A stream of whole texts, ``batch`` at a time, the shorter ones padded after their end.

    A causal model does not look there. The experts that every position is sent to are added to ``routes``. It is
    computed in ``threads``, if given. Texts of one of the ``groups`` are computed together and with no others, so that
    the numbers of a group depend on its own texts alone; by default all texts are one group.
    """

    def __init__(
        self,
        reference: Reference,
        texts: Sequence[EvaluationText],
        directory: Path,
        *,
        batch: int = 1,
        threads: int | None = None,
        routes: Routes | None = None,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.states = ReferenceStates(texts, reference.architecture.hidden_size, directory)
        self.routes = routes
        self._reference, self._batch, self._threads = reference, batch, threads
        self._groups = [range(len(texts))] if groups is None else groups
        lengths = {len(text.ids) for text in texts}
        self._positions = {length: reference.position_embeddings(length) for length in lengths}
        self._selections = Selections(directory, reference.architecture.attended_tokens)

    def embed(self) -> None:
        """Begin with the embeddings of all texts."""
        self.states.embed(self._reference)

    def through(self, block: Block) -> None:
        """Take every text through ``block``."""
        with _threads(self._threads):
            for group in self._groups:
                for start in range(0, len(group), self._batch):
                    self._attend(block, group[start : start + self._batch])
                if block.layer.mlp.routed:
                    through_mlp(block, self.states.only(group), _TOGETHER, self.routes)

    def _attend(self, block: Block, batch: Sequence[int]) -> None:
        """Take a batch through ``block``, or through its attention alone where experts follow."""
        states, texts = self.states, self.states.texts
        longest = max(len(texts[text].ids) for text in batch)
        padded = [pad(states.load(text), (0, 0, 0, longest - len(texts[text].ids))) for text in batch]
        run = block.attended if block.layer.mlp.routed else block.selecting
        outputs, selection = run(torch.cat(padded), self._positions[longest], self._selections.load(batch[0]))
        self._selections.save(batch[0], selection)
        for text, output in zip(batch, outputs, strict=True):
            states.save(text, output[: len(texts[text].ids)])

    def finish(self) -> ReferenceStates:
        """Return the states after the final norm."""
        with _threads(self._threads):
            self.states.norm(self._reference)
        return self.states


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
    """Run the original over ``texts``, one block in memory at a time, and return its states after the final norm.

    ``batch`` texts at a time, the shorter ones padded after their end, where a causal model does not look. Each
    finished block is committed to ``kept``, where the next call with the same texts goes on. The experts that
    every position is sent to are added to ``routes``.
    """
    stream = TextStream(reference, texts, directory, batch=batch, routes=routes)
    return pass_together(reference, [stream], progress, label, kept)[0]


def pass_together(
    reference: Reference,
    streams: Sequence[TextStream],
    progress: Progress,
    label: str,
    kept: WorkDirectory | None = None,
) -> list[ReferenceStates]:
    """Take several ``streams`` through the blocks of ``reference``, and return the states of each.

    Each block is read and filled once for all of them. With ``kept`` it is as with ``reference_states``.
    """
    layers = reference.architecture.layers
    finished = _resume(streams, kept, len(layers)) if kept else 0
    if not finished:
        for stream in streams:
            stream.embed()
    committed = finished

    def commit(index: int) -> None:
        nonlocal committed
        # The states alone are not enough to resume from where the next block uses the selection of this one.
        if kept and not (index < len(layers) and layers[index].attention.shared_selection):
            rows = (states for stream in streams for states in stream.states.each())
            kept.commit(_step(index - 1), {}, {}, {_STATES: rows}, _routes_of(streams))
            kept.forget(_step(committed - 1))
            committed = index

    pass_blocks(reference, streams, progress, label, finished, commit)
    return [stream.finish() for stream in streams]


def pass_blocks(
    reference: Reference,
    streams: Sequence[BlockStream],
    progress: Progress,
    label: str,
    finished: int = 0,
    behind: Callable[[int], None] = lambda _: None,
) -> None:
    """Take ``streams`` through every block but the ``finished`` first ones, one block in memory at a time.

    ``behind`` is called with the number of blocks that are finished then.
    """
    layers = reference.architecture.layers
    with progress.track(label, len(layers)) as track:
        track.advance(finished)
        for index, layer in enumerate(layers[finished:], finished + 1):
            block = reference.block(layer)
            for stream in streams:
                stream.through(block)
            behind(index)
            track.advance()


def through_mlp(block: Block, states: ReferenceStates, together: int, routes: Routes | None = None) -> None:
    """Take texts that have passed a block's attention through its MLP or experts, ``together`` positions at a time."""
    waiting: list[int] = []
    lengths = [len(text.ids) for text in states.texts]
    for index in range(len(lengths)):
        waiting.append(index)
        if index + 1 < len(lengths) and sum(lengths[i] for i in waiting) + lengths[index + 1] <= together:
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


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _step(layer: int) -> str:
    return f"{_STATES}-{layer:03}"


def _routes_of(streams: Sequence[TextStream]) -> dict[str, Tensor]:
    """Return the experts that every stream was sent to so far, by the stream's number and the layer's."""
    return {
        f"{place}.{layer}": experts
        for place, stream in enumerate(streams)
        if stream.routes is not None
        for layer, experts in stream.routes.layers.items()
    }


def _resume(streams: Sequence[TextStream], kept: WorkDirectory, layers: int) -> int:
    """Read the states after the last block that was committed, and return the number of finished blocks."""
    for finished in range(layers, 0, -1):
        step = _step(finished - 1)
        if kept.record(step) is None or not kept.has_activations(step, _STATES):
            continue
        rows = sum(len(text.ids) for stream in streams for text in stream.states.texts)
        stored = kept.activations(step, _STATES, (rows, 1, streams[0].states.hidden_size))
        start = 0
        for stream in streams:
            for index, text in enumerate(stream.states.texts):
                stop = start + len(text.ids)
                stream.states.save(index, stored.read(start, stop).transpose(0, 1))
                start = stop
        for name, experts in kept.tensors(step).items():
            place, layer = map(int, name.split("."))
            routes = streams[place].routes
            assert routes is not None
            routes.add(layer, experts)
        return finished
    return 0
