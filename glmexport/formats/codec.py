"""The interface Codec: the operations on matrices of one stored format, as methods of an object for that format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from glmexport.foundation.recipe import Format


@dataclass(frozen=True)
class Numbers:
    """A matrix [N, K] as numbers: ``codes`` [N, K] uint8, ``scales`` [N, G] fp16, ``zero_points`` [N, G] uint8 or None.

    G is the number of groups in a row, ceil(K / group_size).
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None


class Grid(Protocol):
    """The values that one group of every row can have: ``scale`` times a level, of which each code names one.

    Groups are [group, rows], as in all rounding. A grid fitted to a group has one scale and one zero point
    a row; a format without zero points has zeros there.
    """

    @property
    def scale(self) -> Tensor:
        """The scale [rows] fp32, which fp16 holds exactly."""

    @property
    def zero_point(self) -> Tensor:
        """The zero point [rows] fp32 with integral values."""

    def nearest_(self, scaled: Tensor) -> Tensor:
        """Replace ``scaled`` [..., rows], weights in units of the scale, by their nearest levels, in place."""

    def levels(self, codes: Tensor) -> Tensor:
        """Return the levels [..., rows] fp32 that ``codes`` [..., rows] uint8 name."""

    def codes(self, levels: Tensor) -> Tensor:
        """Return the codes [..., rows] uint8 of ``levels`` [..., rows]; the inverse of ``levels``."""

    def encode(self, weights: Tensor) -> Tensor:
        """Return the codes [..., rows] uint8 that are nearest to ``weights`` [..., rows] fp32."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return the weights [..., rows] fp32 that ``codes`` [..., rows] uint8 mean."""


class Codec(Protocol):
    """One stored format: the fit and the rounding of a group, the layout of codes in bytes, and their meaning."""

    @property
    def form(self) -> Format:
        """The format of this codec."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the tensors of a packed matrix: codes, scales, and zero_points where there are any."""

    @property
    def reach(self) -> float:
        """The largest level by magnitude: the largest weight of a group is at least the scale times this level."""

    @property
    def step(self) -> float:
        """The mean distance between neighbouring levels."""

    @property
    def searched(self) -> bool:
        """Whether searching for the scale of a group gains anything over covering its range."""

    @property
    def looked_up(self) -> bool:
        """Whether a runtime looks up rows of such a matrix, so that an embedding can have the format."""

    def holds(self, columns: int) -> bool:
        """Return whether rows of so many columns can be stored."""

    def stored_bits(self, shape: tuple[int, ...]) -> int:
        """Return the bits that a matrix [N, K] of ``shape`` takes, padding of groups and bytes included."""

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that a matrix [rows, columns] is packed into, by part."""

    def fit(self, weights: Tensor, importance: Tensor | None) -> Grid:
        """Return the grid of a group: the one that covers its range, or the best of a search.

        Args:
            weights: [group, rows] fp32.
            importance: [group] fp32, weight of the squared error in each column; None: no search.
        """

    def grid(self, scale: Tensor, zero_point: Tensor) -> Grid:
        """Return the grid of given ``scale`` and ``zero_point``, each [rows] fp32."""

    def numbers(self, codes: Tensor, scales: Tensor, zero_points: Tensor) -> Numbers:
        """Return ``codes`` [N, K] uint8 with fp32 ``scales`` and ``zero_points`` [N, G] in the types stored."""

    def dequantize(self, numbers: Numbers) -> Tensor:
        """Return the matrix [N, K] fp32 that a runtime computes with."""

    def pack(self, numbers: Numbers) -> dict[str, Tensor]:
        """Return the tensors of ``parts`` as they are stored, each with the rows along its first axis."""

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Numbers:
        """Return the numbers of ``packed`` tensors, whose rows have so many ``columns``; the inverse of ``pack``."""
