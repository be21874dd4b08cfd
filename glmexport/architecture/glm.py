"""``glm``: GLM-4-9B in its transformers form, and GLM-Edge."""

from __future__ import annotations

from glmexport.architecture.dense import dense_architecture
from glmexport.architecture.description import Architecture
from glmexport.checkpoint.checkpoint import Checkpoint

MODEL_TYPE = "glm"


def describe(checkpoint: Checkpoint) -> Architecture:
    """Describe pre-norm layers, grouped-query attention, interleaved rotary embedding on part of a head, gated MLP."""
    return dense_architecture(checkpoint, MODEL_TYPE, sandwich_norms=False)
