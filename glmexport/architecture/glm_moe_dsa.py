"""``glm_moe_dsa``: GLM-5, 5.1 and 5.2."""

from __future__ import annotations

from glmexport.architecture.description import Architecture
from glmexport.architecture.latent_family import IndexerPlan, every_layer, latent_architecture, mlp_types
from glmexport.checkpoint import Checkpoint, ConfigReader
from glmexport.errors import CheckpointError

MODEL_TYPE = "glm_moe_dsa"

_PATTERN = {"F": "full", "S": "shared"}


def describe(checkpoint: Checkpoint) -> Architecture:
    """``glm4_moe_lite`` with an indexer: a token attends to ``index_topk`` tokens, chosen anew in ``full`` layers."""
    config = checkpoint.config
    layers = config.integer("num_hidden_layers", minimum=1)
    dense = min(config.integer("first_k_dense_replace", default=3, minimum=0), layers)
    types = mlp_types(config, layers, ["dense"] * dense + ["sparse"] * (layers - dense))
    config.integer("q_lora_rank", minimum=1)
    plan = IndexerPlan(
        heads=config.integer("index_n_heads", default=32, minimum=1),
        head_dim=config.integer("index_head_dim", default=128, minimum=1),
        top_k=config.integer("index_topk", default=2048, minimum=1),
        full=tuple(kind == "full" for kind in _indexer_types(config, layers)),
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


def _indexer_types(config: ConfigReader, layers: int) -> tuple[str, ...]:
    """Of every layer ``full`` or ``shared``: a list, a pattern, or a period, whichever the configuration has first."""
    kinds = tuple(_PATTERN.values())
    if config.has("indexer_types"):
        return every_layer(config, "indexer_types", config.texts("indexer_types"), kinds, layers)
    if config.has("index_topk_pattern"):
        pattern = config.values["index_topk_pattern"]
        given = (
            [_PATTERN.get(letter, letter) for letter in pattern]
            if isinstance(pattern, str)
            else config.texts("index_topk_pattern")
        )
        return every_layer(config, "index_topk_pattern", given, kinds, layers)
    period = max(config.integer("index_topk_freq", default=1), 1)
    offset = config.integer("index_skip_topk_offset", default=2)
    return tuple("shared" if max(index - offset + 1, 0) % period else "full" for index in range(layers))
