"""Texts that grow, of which each pass through the original computes the new tokens alone.

What the attention of a block keeps of the tokens before is in a file, and the share of few texts in memory at a time:
keys and values, or the latents that they are made of, as transformers' own cache holds them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

from glmexport.architecture.description import Architecture
from glmexport.foundation.progress import Progress
from glmexport.reference.past import Parts, Past
from glmexport.reference.reference import Block, Reference
from glmexport.validation.reference import (
    ReferenceStates,
    Selections,
    embed_together,
    pass_blocks,
    through_mlp,
)
from glmexport.validation.texts import EvaluationText

#: Number of tokens, with padding, of all texts of a batch, whose keys and values of all heads are in memory.
_ATTENDED = 1 << 12
#: Number of positions that an MLP, or routed experts, see together. The former's activations are far wider; the latter
#: are read for it.
_TOGETHER, _ROUTED_TOGETHER = 1 << 10, 1 << 13


def kept_bytes(architecture: Architecture) -> int:
    """Return the bytes that the caches of all blocks keep of a token, in fp32."""
    return 4 * sum(_values(architecture))


def _values(architecture: Architecture) -> list[int]:
    attentions = [layer.attention for layer in architecture.layers]
    return [attention.latent_values or attention.head_values for attention in attentions]


class PastFile:
    """A file without a name that holds the caches of all blocks for texts that grow to ``lengths`` tokens.

    Nothing is kept of a text whose length is 0.
    """

    def __init__(self, architecture: Architecture, lengths: Sequence[int], directory: Path) -> None:
        self._lengths = lengths
        self._values = _values(architecture)
        self._file = TemporaryFile(dir=directory)  # noqa: SIM115 - lives as long as this object
        weakref.finalize(self, self._file.close)
        self._layers = (sum(lengths) * np.cumsum([0, *self._values])).tolist()
        self._texts = np.cumsum([0, *lengths]).tolist()
        #: Heads and width of each part that a layer keeps.
        self.shapes: dict[int, list[tuple[int, ...]]] = {}

    def keeps(self, text: int) -> bool:
        """Return whether anything is kept of a text."""
        return self._lengths[text] > 0

    def load(self, layer: int, text: int, length: int) -> Parts:
        """Return what ``layer`` keeps of the first ``length`` tokens of a text."""
        if not length:
            return ()
        self._seek(layer, text, 0)
        buffer = bytearray(self._file.read(4 * length * self._values[layer]))
        rows = torch.frombuffer(buffer, dtype=torch.float32).reshape(length, -1)
        shapes = self.shapes[layer]
        split = torch.split(rows, [heads * width for heads, width in shapes], 1)
        return tuple(part.reshape(length, *shape) for part, shape in zip(split, shapes, strict=True))

    def save(self, layer: int, text: int, length: int, parts: Parts) -> None:
        """Add tokens behind the first ``length`` ones of a text; those that follow in the file are void."""
        if not self.keeps(text):
            return
        self.shapes[layer] = [tuple(part.shape[1:]) for part in parts]
        rows = torch.cat([part.flatten(1) for part in parts], 1)
        assert rows.shape[1] == self._values[layer], "the description says how much a layer keeps of a token"
        assert length + len(rows) <= self._lengths[text], "a text grows no longer than was said"
        self._seek(layer, text, length)
        self._file.write(rows.contiguous().numpy().data.cast("B"))

    def rows(self, text: int, start: int, stop: int) -> Tensor:
        """Return what all layers keep of the tokens ``start`` to ``stop`` of a text, [values] fp32."""
        parts = []
        for layer, values in enumerate(self._values):
            self._seek(layer, text, start)
            parts.append(torch.frombuffer(bytearray(self._file.read(4 * (stop - start) * values)), dtype=torch.float32))
        return torch.cat(parts)

    def restore(self, text: int, start: int, stop: int, rows: Tensor) -> None:
        """Add what ``rows`` has returned, in another file or this one."""
        counts = [(stop - start) * values for values in self._values]
        for layer, part in enumerate(torch.split(rows, counts)):
            self._seek(layer, text, start)
            self._file.write(part.contiguous().numpy().data.cast("B"))

    def _seek(self, layer: int, text: int, token: int) -> None:
        self._file.seek(4 * (self._layers[layer] + (self._texts[text] + token) * self._values[layer]))


@dataclass(frozen=True)
class Suffix:
    """New tokens of the text ``index``, behind ``start`` tokens of it that are kept."""

    index: int
    start: int
    tokens: Sequence[int]


class SuffixStream:
    """A stream of ``suffixes`` through the blocks, which begins with the embeddings of ``states``.

    Attention takes together those of one length, and the rest of a block all of them.
    """

    def __init__(self, reference: Reference, suffixes: Sequence[Suffix], past: PastFile, directory: Path) -> None:
        texts = [EvaluationText(str(each.index), "", torch.tensor(each.tokens), 1) for each in suffixes]
        self._reference, self._suffixes, self._past = reference, suffixes, past
        self.states = ReferenceStates(texts, reference.architecture.hidden_size, directory)
        attended = reference.architecture.attended_tokens
        # Which of equal scores an indexer selects depends on where they are, so that it is given no padding.
        self._batches = list(batches(suffixes, min(attended or _ATTENDED, _ATTENDED)))
        self._selections = Selections(directory, reference.architecture.attended_tokens)

    def through(self, block: Block) -> None:
        """Take every suffix through ``block``, and keep what its attention keeps of them."""
        layer, states = block.layer.index, self.states
        for number, batch in enumerate(self._batches):
            suffixes = [self._suffixes[place] for place in batch]
            past = Past(layer, [self._past.load(layer, each.index, each.start) for each in suffixes])
            outputs, selection = block.attended(
                torch.cat([states.load(place) for place in batch]),
                self._positions(suffixes),
                self._selections.load(number),
                past,
            )
            self._selections.save(number, selection)
            for place, suffix, parts, output in zip(batch, suffixes, past.appended(), outputs, strict=True):
                self._past.save(layer, suffix.index, suffix.start, parts)
                states.save(place, output)
        through_mlp(block, states, _ROUTED_TOGETHER if block.layer.mlp.routed else _TOGETHER)

    def _positions(self, suffixes: Sequence[Suffix]) -> tuple[Tensor, Tensor]:
        each = [self._reference.position_embeddings(len(suffix.tokens), suffix.start) for suffix in suffixes]
        return torch.cat([cos for cos, _ in each]), torch.cat([sin for _, sin in each])


def batches(suffixes: Sequence[Suffix], most: int) -> Iterator[list[int]]:
    """Yield the places of suffixes of one length, so many together that they have ``most`` tokens with their pasts.

    One that has more is alone.
    """
    batch: list[int] = []
    for place in sorted(range(len(suffixes)), key=lambda place: (len(suffixes[place].tokens), suffixes[place].start)):
        # In this order the next one's past is the longest.
        count, whole = len(suffixes[place].tokens), suffixes[place].start + len(suffixes[place].tokens)
        same = not batch or len(suffixes[batch[0]].tokens) == count
        if not same or (batch and (len(batch) + 1) * whole > most):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def likeliest_next(
    reference: Reference,
    streams: Sequence[SuffixStream],
    asked: Sequence[Sequence[int]],
    progress: Progress,
    label: str,
) -> list[list[list[int]]]:
    """Return the token that the original finds likeliest behind each of the last ``asked`` tokens of every suffix.

    Each block, and the lm_head, is read once for all streams; what one stream gives does not depend on the others.
    """
    embed_together(reference, [stream.states for stream in streams])
    pass_blocks(reference, streams, progress, label)
    rows = []
    for stream, counts in zip(streams, asked, strict=True):
        states = [stream.states.load(place)[0, -count:] for place, count in enumerate(counts)]
        rows.append(reference.final_norm(torch.cat(states)))
    found = zip(reference.likeliest(rows), asked, strict=True)
    return [[part.tolist() for part in torch.split(tokens, list(counts))] for tokens, counts in found]
