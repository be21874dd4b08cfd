"""Work by its kind, and what a unit of each kind costs on a machine: the two sides of an account of cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Range:
    """The least and the most that something is expected to be."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Range:
        """Return both ends multiplied by a positive ``factor``."""
        return Range(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Work:
    """Amounts of work by kind. A multiply-add is two operations."""

    #: Operations of fp32 products of large matrices.
    products: float = 0.0
    #: Operations of the products by which calibration text passes the blocks where it may do so in bf16.
    coarse_products: float = 0.0
    #: Operations of Hessians, whose products are of slabs of few rows; and where inputs may be rounded to bf16.
    moments: float = 0.0
    coarse_moments: float = 0.0
    #: Operations of Cholesky factorizations, and of solving with their factors.
    triangular: float = 0.0
    #: Operations of softmax attention, those behind its causal mask included.
    attention: float = 0.0
    #: Columns that the sweep visits, each for all rows of a chunk; and the weights in them.
    swept_columns: float = 0.0
    swept_weights: float = 0.0
    #: The same of each round of the polish.
    polished_columns: float = 0.0
    polished_weights: float = 0.0
    #: Weights whose scale and zero point are searched.
    searched_weights: float = 0.0
    #: Weights that are rounded to nearest, dequantized and laid out.
    rounded_weights: float = 0.0
    #: Numbers of the checkpoint that are read, checked to be finite and converted to fp32.
    read_values: float = 0.0
    #: Bytes that are hashed, and bytes that are written.
    hashed_bytes: float = 0.0
    written_bytes: float = 0.0
    #: Logits of two models that are compared, over the whole vocabulary.
    compared_logits: float = 0.0
    #: Operations of the bundle's products in its runtime, many tokens at a time; bytes of weights read a token alone.
    bundle_products: float = 0.0
    bundle_bytes: float = 0.0
    #: Seconds that are spent whatever the machine is.
    fixed_seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(**{kind: getattr(self, kind) + getattr(other, kind) for kind in KINDS})

    def times(self, factor: float) -> Work:
        """Return ``factor`` times the work."""
        return Work(**{kind: getattr(self, kind) * factor for kind in KINDS})

    def seconds(self, unit_costs: Mapping[str, Range]) -> Range:
        """Return what it takes where a unit of each kind costs ``unit_costs`` seconds."""
        total = Range(self.fixed_seconds, self.fixed_seconds)
        for kind, cost in unit_costs.items():
            total += cost.times(getattr(self, kind))
        return total


KINDS = tuple(field.name for field in fields(Work))
#: The kinds whose unit has a cost that is measured on a machine.
MEASURED_KINDS = tuple(kind for kind in KINDS if kind != "fixed_seconds")
#: Work by the stage of a build that does it, in the order of the stages.
Account = dict[str, Work]


def added(account: Account, stage: str, work: Work) -> None:
    """Add ``work`` to a ``stage`` of ``account``, in place."""
    account[stage] = account.get(stage, Work()) + work
