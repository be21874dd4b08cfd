"""``glm5_next``: GLM-5.3-Flash. It is recognised, and what of it cannot be built yet is told part by part."""

from __future__ import annotations

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.checkpoint.config import ConfigReader

MODEL_TYPE = "glm5_next"


def missing_parts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what the model has, by its config.json, and no declaration, graph or reference does here.

    Keys that are absent have transformers' defaults.

    Raises:
        CheckpointError: a key is of another type.
    """
    whole = checkpoint.config
    config = _language_model(whole)
    layers = config.integer("num_hidden_layers", default=45, minimum=1)
    kinds = config.texts("layer_types") if config.has("layer_types") else _quarters(layers)
    linear = sum(kind == "linear_attention" for kind in kinds)
    experts = (
        sum(kind == "sparse" for kind in config.texts("mlp_layer_types"))
        if config.has("mlp_layer_types")
        else max(layers - 3, 0)
    )
    convolution = config.integer("linear_conv_kernel_dim", default=4)
    if config.has("linear_attn_config"):
        convolution = config.section("linear_attn_config").integer("short_conv_kernel_size", default=convolution)
    pool, streams = config.integer("index_kpool", default=16), config.integer("hc_mult", default=4)
    found = {
        f"linear attention with a decay for every channel (KDA) behind convolutions of {convolution} tokens, with its "
        f"recurrent state as a cache, in {linear} of {layers} layers": linear,
        f"an indexer that selects pools of {pool} tokens, over latent attention without rotary dimensions, in "
        f"{layers - linear} layers": layers - linear,
        f"hyper-connections: {streams} residual streams, mixed before and behind every branch by matrices that "
        f"{config.integer('hc_sinkhorn_iters', default=20)} Sinkhorn iterations normalise": streams > 1,
        f"mixtures of {config.integer('n_routed_experts', default=288)} experts in {experts} layers": experts,
        f"gates and ups clamped at {config.number('swiglu_limit', default=10.0):g}": True,
        "the vision tower": whole.has("vision_config"),
    }
    return tuple(part for part, present in found.items() if present)


def _quarters(layers: int) -> tuple[str, ...]:
    return tuple("indexed_attention" if index % 4 == 3 else "linear_attention" for index in range(layers))


def _language_model(config: ConfigReader) -> ConfigReader:
    return config.section("text_config") if config.has("text_config") else config
