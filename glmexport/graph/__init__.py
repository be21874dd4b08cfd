"""The decoder as an ONNX graph of our own operators, before anything is decided about the hardware."""

from glmexport.graph.build import build_draft, build_graph, build_part, cache_bytes_per_token, own_loop
from glmexport.graph.names import (
    ATTENTION_MASK,
    BLOCK_NAME,
    HIDDEN,
    INDEX,
    INPUT_IDS,
    LATENT,
    LOGITS,
    PAST,
    PAST_HIDDEN,
    PRESENT,
    RECENT_LOGITS,
    SHORT_STEP,
    STREAM_IN,
    STREAM_OUT,
)
from glmexport.graph.operators import BLOCK, DOMAIN, violations

__all__ = [
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
    "PRESENT",
    "RECENT_LOGITS",
    "SHORT_STEP",
    "STREAM_IN",
    "STREAM_OUT",
    "build_draft",
    "build_graph",
    "build_part",
    "cache_bytes_per_token",
    "own_loop",
    "violations",
]
