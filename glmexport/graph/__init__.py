"""The decoder as an ONNX graph of our own operators, before anything is decided about the hardware."""

from glmexport.graph.build import build_draft, build_graph, build_part, cache_bytes_per_token, own_loop
from glmexport.graph.fixed import FixedSizes, build_fixed, fixed_sizes
from glmexport.graph.heads import rotates_inside, unfit_heads
from glmexport.graph.names import (
    ASKED,
    ATTENTION_MASK,
    BLOCK_NAME,
    HIDDEN,
    INDEX,
    INPUT_IDS,
    LATENT,
    LOGITS,
    PAST,
    PAST_HIDDEN,
    POSITION_IDS,
    PRESENT,
    RECENT_LOGITS,
    SHORT_STEP,
    STREAM_IN,
    STREAM_OUT,
)
from glmexport.graph.operators import BLOCK, DOMAIN, violations

__all__ = [
    "ASKED",
    "ATTENTION_MASK",
    "BLOCK",
    "BLOCK_NAME",
    "DOMAIN",
    "HIDDEN",
    "INDEX",
    "INPUT_IDS",
    "LATENT",
    "LOGITS",
    "PAST",
    "PAST_HIDDEN",
    "POSITION_IDS",
    "PRESENT",
    "RECENT_LOGITS",
    "SHORT_STEP",
    "STREAM_IN",
    "STREAM_OUT",
    "FixedSizes",
    "build_draft",
    "build_fixed",
    "build_graph",
    "build_part",
    "cache_bytes_per_token",
    "fixed_sizes",
    "own_loop",
    "rotates_inside",
    "unfit_heads",
    "violations",
]
