"""Matrices that no single tensor of the files holds: packed ones, and ones whose rows are in several tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from glmexport.checkpoint.gptq import GptqFormat
from glmexport.checkpoint.header import TensorEntry
from glmexport.checkpoint.packed import PackedMatrix
from glmexport.errors import CheckpointError

GPTQ = "GPTQ"
_SLAB_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class DerivedMatrix:
    """A matrix [rows, columns] under the name of a weight; ``parts`` are its rows, in order."""

    name: str
    parts: tuple[TensorEntry | PackedMatrix, ...]

    @property
    def form(self) -> GptqFormat | None:
        """The format that all parts are stored in; None for full precision."""
        first = self.parts[0]
        return first.form if isinstance(first, PackedMatrix) else None

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """The tensors of the files that it is made of."""
        return tuple(
            entry for part in self.parts for entry in (part.entries if isinstance(part, PackedMatrix) else (part,))
        )

    @property
    def entry(self) -> TensorEntry:
        """How the checkpoint lists it: its shape as a weight, its bytes as stored."""
        first = self.parts[0]
        dtype, columns = (GPTQ, first.columns) if isinstance(first, PackedMatrix) else (first.dtype, first.shape[1])
        rows, size = sum(map(_rows, self.parts)), sum(entry.bytes for entry in self.stored)
        return TensorEntry(self.name, dtype, (rows, columns), 0, size, self.stored[0].path)

    def slabs(self, start: int, stop: int) -> Iterator[tuple[TensorEntry | PackedMatrix, int, int]]:
        """Rows [start, stop) as pieces of parts, (part, first row, end row), each small enough to decode at once."""
        height = max(1, _SLAB_WEIGHTS // max(1, self.entry.shape[1]))
        first = 0
        for part in self.parts:
            begin, end = max(start - first, 0), min(stop - first, _rows(part))
            for row in range(begin, end, height):
                yield part, row, min(row + height, end)
            first += _rows(part)


def packed_weights(matrices: Mapping[str, PackedMatrix]) -> dict[str, DerivedMatrix]:
    """Each quantized matrix under the name that its weight has in full precision."""
    weights = (DerivedMatrix(f"{module}.weight", (matrix,)) for module, matrix in matrices.items())
    return {weight.name: weight for weight in weights}


def stack(name: str, parts: Sequence[TensorEntry | DerivedMatrix]) -> DerivedMatrix:
    """One matrix of the rows of several.

    Raises:
        CheckpointError: they differ in width or in how they are stored.
    """
    listed = [part.entry if isinstance(part, DerivedMatrix) else part for part in parts]
    forms = {part.form if isinstance(part, DerivedMatrix) else None for part in parts}
    if len(forms) > 1 or len({(entry.dtype, entry.shape[1:]) for entry in listed}) > 1:
        shown = " and ".join(f"{entry.name} ({entry.dtype} {list(entry.shape)})" for entry in listed)
        formats = sorted("full precision" if form is None else form.label for form in forms)
        raise CheckpointError(
            f"{shown} are one matrix of the model, and they are stored as {' and '.join(formats)}.",
            next_step="Quantize both in the same format, or leave both out.",
        )
    flat = [piece for part in parts for piece in (part.parts if isinstance(part, DerivedMatrix) else (part,))]
    return DerivedMatrix(name, tuple(flat))


def _rows(part: TensorEntry | PackedMatrix) -> int:
    return part.rows if isinstance(part, PackedMatrix) else part.shape[0]
