"""The decoder as an ONNX graph of our own operators, before anything is decided about the hardware."""

from glmexport.graph.build import build_graph
from glmexport.graph.names import ATTENTION_MASK, INDEX, INPUT_IDS, LATENT, LOGITS, PAST, PRESENT
from glmexport.graph.operators import BLOCK, DOMAIN, violations

__all__ = [
    "ATTENTION_MASK",
    "BLOCK",
    "DOMAIN",
    "INDEX",
    "INPUT_IDS",
    "LATENT",
    "LOGITS",
    "PAST",
    "PRESENT",
    "build_graph",
    "violations",
]
