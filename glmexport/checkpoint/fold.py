"""Exact changes of scale: powers of two that move from a tensor into the one that reads its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ROWS, _COLUMNS = "rows", "columns"


@dataclass(frozen=True)
class Fold:
    """Powers of two that a tensor is multiplied by, as exponents: ``rows`` [N] and ``columns`` [K] int8, or None.

    A floating-point value times a power of two is exact as long as it neither overflows nor becomes subnormal.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def apply(self, values: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Multiply ``values`` [n, K] or [n], the tensor's rows from ``start`` on, in place; returns them."""
        return self._multiply(values, start, 1)

    def undo(self, values: torch.Tensor) -> torch.Tensor:
        """Return the inverse of ``apply``, on a whole tensor."""
        return self._multiply(values, 0, -1)

    def _multiply(self, values: torch.Tensor, start: int, sign: int) -> torch.Tensor:
        import torch

        if self.rows is not None:
            exponents = self.rows[start : start + len(values)]
            values.mul_(torch.exp2(sign * exponents.float()).reshape(-1, *[1] * (values.dim() - 1)))
        return values if self.columns is None else values.mul_(torch.exp2(sign * self.columns.float()))


def as_tensors(folds: Mapping[str, Fold]) -> dict[str, torch.Tensor]:
    """Return folds, given by the name of their tensor, as tensors that can be stored."""
    parts = {f"{key}.{_ROWS}": fold.rows for key, fold in folds.items()}
    parts |= {f"{key}.{_COLUMNS}": fold.columns for key, fold in folds.items()}
    return {name: part.contiguous() for name, part in parts.items() if part is not None}


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, Fold]:
    """Return the inverse of ``as_tensors``."""
    keys = {name.rpartition(".")[0] for name in tensors}
    return {key: Fold(tensors.get(f"{key}.{_ROWS}"), tensors.get(f"{key}.{_COLUMNS}")) for key in sorted(keys)}
