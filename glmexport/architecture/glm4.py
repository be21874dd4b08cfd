"""``glm4``: GLM-4-0414 in 9B and 32B, and the dense 32B GLM-5.2."""

from __future__ import annotations

from glmexport.architecture.dense import dense_architecture
from glmexport.architecture.description import Architecture
from glmexport.checkpoint.checkpoint import Checkpoint

MODEL_TYPE = "glm4"


def describe(checkpoint: Checkpoint) -> Architecture:
    """Describe the ``glm`` layer with two more norms: on the attention's output and on the MLP's output."""
    return dense_architecture(checkpoint, MODEL_TYPE, sandwich_norms=True)
