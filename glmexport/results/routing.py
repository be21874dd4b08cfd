"""Records of whether a mixture of experts still sends its tokens to the same experts."""

from __future__ import annotations

from glmexport.foundation.definition import Count, Number
from glmexport.results.record import Record


class LayerRouting(Record):
    """The routing of one layer of experts, with the bundle's weights in fp32 arithmetic behind its own layers."""

    layer: Count
    """Decoder block, from 0."""
    positions: Count
    same_set: Number
    """Share of positions that all go to the experts they go to in the original, 0 to 1."""
    same_experts: Number
    """Share of all choices that the original makes too, 0 to 1."""
