"""The family ``glm4_moe_lite``: GLM-4.7-Flash."""

from __future__ import annotations

from glmexport.architecture.description import Architecture
from glmexport.architecture.latent_family import every_layer, latent_architecture
from glmexport.checkpoint.checkpoint import Checkpoint

MODEL_TYPE = "glm4_moe_lite"


def describe(checkpoint: Checkpoint) -> Architecture:
    """Describe pre-norm layers with latent attention, dense or mixtures of experts by ``mlp_layer_types``."""
    config = checkpoint.config
    layers = config.integer("num_hidden_layers", minimum=1)
    types = every_layer(config, "mlp_layer_types", ("dense", "sparse"), layers)
    return latent_architecture(checkpoint, MODEL_TYPE, lambda index: types[index] == "sparse")
