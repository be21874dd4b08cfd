"""``glm4_moe_lite``: GLM-4.7-Flash."""

from __future__ import annotations

from glmexport.architecture.description import Architecture
from glmexport.architecture.latent_family import latent_architecture, mlp_types
from glmexport.checkpoint import Checkpoint

MODEL_TYPE = "glm4_moe_lite"


def describe(checkpoint: Checkpoint) -> Architecture:
    """Pre-norm layers and latent attention; without ``mlp_layer_types`` all layers but the first have experts."""
    config = checkpoint.config
    layers = config.integer("num_hidden_layers", minimum=1)
    types = mlp_types(config, layers, ["dense", *["sparse"] * (layers - 1)])
    return latent_architecture(checkpoint, MODEL_TYPE, lambda index: types[index] == "sparse")
