"""Matrices that no single tensor of the files holds as it is: packed and scaled ones, parts and joins of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from glmexport.checkpoint.gptq import GptqFormat
from glmexport.checkpoint.header import TensorEntry
from glmexport.checkpoint.packed import PackedMatrix
from glmexport.checkpoint.parts import BlockScaled, StackedMatrix
from glmexport.foundation.errors import CheckpointError

GPTQ = "GPTQ"
_SLAB_WEIGHTS = 1 << 24

#: A source that rows can be read from.
Part = TensorEntry | PackedMatrix | StackedMatrix | BlockScaled


@dataclass(frozen=True)
class DerivedMatrix:
    """A matrix [rows, columns] under the name of a weight; ``parts`` are its rows, in order."""

    name: str
    parts: tuple[Part, ...]

    @property
    def form(self) -> GptqFormat | None:
        """The format that all parts are stored in; None for full precision."""
        first = self.parts[0]
        return first.form if isinstance(first, PackedMatrix) else None

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
        dtype = GPTQ if isinstance(first, PackedMatrix) else first.dtype
        columns = first.shape[1] if isinstance(first, TensorEntry) else first.columns
        rows, size = sum(map(_rows, self.parts)), sum(map(_bytes, self.parts))
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


def packed_weights(matrices: Mapping[str, PackedMatrix]) -> dict[str, DerivedMatrix]:
    """Return each quantized matrix under the name that its weight has in full precision."""
    weights = (DerivedMatrix(f"{module}.weight", (matrix,)) for module, matrix in matrices.items())
    return {weight.name: weight for weight in weights}


def scaled_weights(matrices: Mapping[str, BlockScaled]) -> dict[str, DerivedMatrix]:
    """Return each fp8 matrix under the name of its weight."""
    return {name: DerivedMatrix(name, (matrix,)) for name, matrix in matrices.items()}


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
    return DerivedMatrix(name, tuple(flat))


def _rows(part: Part) -> int:
    return part.shape[0] if isinstance(part, TensorEntry) else part.rows


def _bytes(part: Part) -> int:
    return sum(entry.bytes for entry in part.entries) if isinstance(part, PackedMatrix) else part.bytes
