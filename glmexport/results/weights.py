"""Records of whether the graph holds the numbers that it should."""

from __future__ import annotations

from typing import Literal

from glmexport.foundation.definition import Count
from glmexport.results.record import Record


class WeightFault(Record):
    """A tensor of the graph that is not what it should be."""

    tensor: str
    """Name of the tensor in the checkpoint; of a rotary table, in the graph."""
    kind: Literal["other", "far"]
    """Kind of the fault. The kind other: not the numbers that were decided on, or not the original's; far: those, but a
    row has lost the original's."""
    detail: str


class WeightCheck(Record):
    """The comparison of every number of the graph, read back, with what it should be."""

    matrices: Count
    """Number of quantized matrices."""
    undecided: Count
    """Number of quantized matrices without a record of what the quantizer decided: only their distance from the
    original is known."""
    tensors: Count
    """Number of all other tensors, which have to equal the original's."""
    faults: tuple[WeightFault, ...]
