"""Weights in the formats of a recipe, rounded to nearest whenever they are read: none is kept or written."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from glmexport.architecture.description import Architecture
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.formats.nearest import nearest_without_text
from glmexport.formats.plan import FormatPlan, stored_formats
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format, Recipe
from glmexport.quantization.stored import stored_linear
from glmexport.quantization.weights import Weights

#: Number of weights that are rounded together.
_CHUNK = 1 << 24


class RoundedWeights(Weights):
    """All matrices in the formats of ``recipe``, on a ``searched`` grid or on the one that just covers the range.

    The search costs several times the rounding, and changes no speed. Matrices of a quantized checkpoint keep their
    codes.
    """

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, recipe: Recipe, *, searched: bool) -> None:
        super().__init__(checkpoint, architecture, None, [])
        self._searched = searched
        self._plan = FormatPlan.of(architecture, recipe, stored_formats(checkpoint))
        self._kept = frozenset(checkpoint.quantized) if recipe.keeps_stored else frozenset()
        #: The matrices that were read last: their codes, scales and zero points are read one after the other.
        self._last: tuple[tuple[str, ...], QuantizedLinear] | None = None

    def form(self, key: str) -> Format | None:
        """Return the format of the matrix with that checkpoint key; None if it stays in full precision."""
        return self._plan.form(key)

    def quantized(self, key: str) -> QuantizedLinear:
        """Return a matrix, which is rounded now."""
        form = self.form(key)
        assert form is not None
        if key in self._kept:
            stored = stored_linear(self.checkpoint, key, _CHUNK)
            assert stored is not None
            return stored
        parts = [nearest_without_text(rows, form, searched=self._searched) for rows in self._chunks(key)]
        return QuantizedLinear.concatenate(parts)

    def packed(self, keys: list[str], what: str) -> Tensor:
        """Return ``codes``, ``scales`` or ``zero_points``, packed and stacked along their rows."""
        wanted = tuple(keys)
        if self._last is None or self._last[0] != wanted:
            self._last = None
            self._last = (wanted, QuantizedLinear.concatenate([self.quantized(key) for key in keys]))
        return self._last[1].pack()[what]

    def _chunks(self, key: str) -> Iterator[Tensor]:
        rows, columns = self.shape(key)
        count = max(64, _CHUNK // columns)
        for start in range(0, rows, count):
            yield self.checkpoint.rows(key, start, min(start + count, rows))
