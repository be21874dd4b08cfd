"""Matrices that no single tensor of the files holds as it is: packed and scaled ones, parts and joins of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from glmexport.checkpoint.codes import CodedMatrix, CodeFormat
from glmexport.checkpoint.header import TensorEntry
from glmexport.checkpoint.parts import ScaledMatrix, StackedMatrix
from glmexport.foundation.errors import CheckpointError

_SLAB_WEIGHTS = 1 << 24

#: A source that rows can be read from.
Part = TensorEntry | CodedMatrix | StackedMatrix | ScaledMatrix


@dataclass(frozen=True)
class DerivedMatrix:
    """A matrix [rows, columns] under the name of a weight; ``parts`` are its rows, in order."""

    name: str
    parts: tuple[Part, ...]
    #: Whether a bundle can keep its codes, where it has any.
    kept: bool = True

    @property
    def form(self) -> CodeFormat | None:
        """The format that all parts are stored in; None where there are no codes to keep."""
        first = self.parts[0]
        return first.form if isinstance(first, CodedMatrix) and self.kept else None

    @property
    def labels(self) -> set[str]:
        """The short names of how its parts are quantized; empty for full precision."""
        return {part.label for part in self.parts if isinstance(part, CodedMatrix | ScaledMatrix)}

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """The tensors of the files that it is made of."""
        return tuple(
            entry for part in self.parts for entry in ((part,) if isinstance(part, TensorEntry) else part.entries)
        )

    @property
    def entry(self) -> TensorEntry:
        """The entry by which the checkpoint lists it: its shape as a weight, its bytes as stored."""
        first = self.parts[0]
        dtype = first.layout if isinstance(first, CodedMatrix) else first.dtype
        columns = first.shape[1] if isinstance(first, TensorEntry) else first.columns
        rows, size = sum(map(_rows, self.parts)), sum(part.bytes for part in self.parts)
        return TensorEntry(self.name, dtype, (rows, columns), 0, size, self.stored[0].path)

    def slabs(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """Yield rows [start, stop) as pieces of parts, (part, first row, end row), small enough to decode at once."""
        height = max(1, _SLAB_WEIGHTS // max(1, self.entry.shape[1]))
        first = 0
        for part in self.parts:
            begin, end = max(start - first, 0), min(stop - first, _rows(part))
            for row in range(begin, end, height):
                yield part, row, min(row + height, end)
            first += _rows(part)


def stack(name: str, parts: Sequence[TensorEntry | DerivedMatrix]) -> DerivedMatrix:
    """Return one matrix of the rows of several.

    Raises:
        CheckpointError: they differ in width or in how they are stored.
    """
    listed = [part.entry if isinstance(part, DerivedMatrix) else part for part in parts]
    forms = {part.form if isinstance(part, DerivedMatrix) else None for part in parts}
    # Full precision is read as fp32, whatever it is stored in.
    if len(forms) > 1 or len({entry.shape[1:] for entry in listed}) > 1:
        shown = " and ".join(f"{entry.name} ({entry.dtype} {list(entry.shape)})" for entry in listed)
        formats = sorted("full precision" if form is None else form.label for form in forms)
        raise CheckpointError(
            f"{shown} are one matrix of the model, and they are stored as {' and '.join(formats)}.",
            next_step="Quantize both in the same format, or leave both out.",
        )
    flat = [piece for part in parts for piece in (part.parts if isinstance(part, DerivedMatrix) else (part,))]
    kept = all(part.kept for part in parts if isinstance(part, DerivedMatrix))
    return DerivedMatrix(name, tuple(flat), kept)


def _rows(part: Part) -> int:
    return part.shape[0] if isinstance(part, TensorEntry) else part.rows
