"""The decoder as an ONNX graph of our own operators, before anything is decided about the hardware."""

from glmexport.graph.build import build_draft, build_graph, own_loop
from glmexport.graph.names import (
    ATTENTION_MASK,
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
)
from glmexport.graph.operators import BLOCK, DOMAIN, violations

__all__ = [
    "ATTENTION_MASK",
    "BLOCK",
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
    "build_draft",
    "build_graph",
    "own_loop",
    "violations",
]
