"""Records of how each matrix was quantized: kept in the bundle's manifest, shown in the report."""

from __future__ import annotations

from typing import Literal

from glmexport.foundation.definition import Definition
from glmexport.foundation.recipe import Format


class QuantizedMatrix(Definition):
    """How one matrix was quantized. None: not measured.

    Errors are relative to the matrix's output on the calibration inputs; that of round-to-nearest is with the recipe's
    search for scales. ``shrinkage`` is the mean share of the asymmetric target's correction that held-out text
    confirmed, ``unpolished_rows`` the rows whose polish it did not, ``nearest_rows`` those that are rounded to nearest
    because that serves it better, or because the whole matrix fell back to it.
    """

    key: str
    #: None for the embedding and the lm_head.
    layer: int | None
    part: str
    bits: int
    group_size: int
    symmetric: bool
    bits_per_weight: float
    #: ``QuantizedLinear.digest`` of what was decided on; None in bundles of before it was recorded.
    digest: str | None = None
    relative_error: float | None = None
    round_to_nearest_error: float | None = None
    damping: float | None = None
    dead_columns: int = 0
    #: Whether fp32 was not precise enough to factor the Hessian, and fp64 did it; nothing is lost by that.
    double: bool = False
    effective_tokens_per_column: float | None = None
    #: Calibration positions whose router chose it; None: all pass it, or none were run.
    chosen: int | None = None
    shrinkage: float | None = None
    unpolished_rows: int = 0
    #: Powers of two were moved between its columns and what writes its input.
    folded: bool = False
    nearest_rows: int = 0
    #: Why the solver could not do what the recipe asks for; None if it did.
    fallback: str | None = None


class ExpertCoverage(Definition):
    """How the calibration text spread over the routed experts of one layer, by the quantized model's own router."""

    layer: int
    #: Positions that chose each expert, in order; those that no Hessian sees are left out.
    tokens: tuple[int, ...]
    #: Experts whose positions alone would be too few to fit anything to: worth less than ``LEAST_TOKENS`` a column.
    cold: tuple[int, ...]


class AllocatedGroup(Definition):
    """Matrices that were given one format together under a budget, and what that costs."""

    name: str
    keys: tuple[str, ...]
    format: Format
    #: Bits that all its matrices are stored in.
    bits: int
    #: Mean KL divergence that the group causes alone in that format, rounded to nearest, everything else original.
    loss_nats: float
    #: False: the loss follows from that of another group size (see ``TieGroup.tried``).
    tried: bool


class StoredTensor(Definition):
    """Where a graph holds quantized matrices, one below the other, and in which format."""

    #: Checkpoint keys of the matrices, in the order of their rows.
    matrices: tuple[str, ...]
    #: Of what is stored: zero points that are spelled out belong to it.
    format: Format
    #: The graph's tensors by what they hold: codes, scales and, where there are any, zero_points.
    parts: dict[str, str]
    #: ``packed``: as the format's codec packs them, rows along the first axis. ``columns``: codes are numbers
    #: [in, out], signed where there are no zero points, and the others [groups, out].
    layout: Literal["packed", "columns"] = "packed"
