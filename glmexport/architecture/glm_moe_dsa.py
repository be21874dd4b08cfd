"""``glm_moe_dsa``: GLM-5, 5.1 and 5.2."""

from __future__ import annotations

from glmexport.architecture.description import Architecture
from glmexport.architecture.latent_family import IndexerPlan, every_layer, latent_architecture
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError

MODEL_TYPE = "glm_moe_dsa"


def describe(checkpoint: Checkpoint) -> Architecture:
    """Describe ``glm4_moe_lite`` with an indexer, whose ``index_topk`` tokens are chosen anew in ``full`` layers."""
    config = checkpoint.config
    layers = config.integer("num_hidden_layers", minimum=1)
    types = every_layer(config, "mlp_layer_types", ("dense", "sparse"), layers)
    # However the configuration says it: transformers makes the list of a pattern or a period.
    indexers = every_layer(config, "indexer_types", ("full", "shared"), layers)
    config.integer("q_lora_rank", minimum=1)
    plan = IndexerPlan(
        heads=config.integer("index_n_heads", minimum=1),
        head_dim=config.integer("index_head_dim", minimum=1),
        top_k=config.integer("index_topk", minimum=1),
        full=tuple(kind == "full" for kind in indexers),
    )
    if plan.head_dim < config.integer("qk_rope_head_dim"):
        raise CheckpointError(
            f"{config.where}: index_head_dim {plan.head_dim} is less than qk_rope_head_dim.",
            next_step="Use the config.json that belongs to these weights.",
        )
    if not plan.full[0]:
        raise CheckpointError(
            f"{config.where}: the first layer has no indexer, and no layer before it whose selection it could share.",
            next_step="Use the config.json that belongs to these weights.",
        )
    return latent_architecture(checkpoint, MODEL_TYPE, lambda index: types[index] == "sparse", plan)
