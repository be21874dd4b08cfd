"""``glm4_moe``: GLM-4.5, GLM-4.5-Air, GLM-4.6 and GLM-4.7."""

from __future__ import annotations

from dataclasses import replace

from glmexport.architecture.dense import dense_architecture, dense_layer
from glmexport.architecture.description import Architecture, DecoderLayer, GatedMlp, Linear, Norm, Rotary
from glmexport.architecture.experts import EXPERT_INPUT, EXPERT_OUTPUT, MixtureOfExperts, Router
from glmexport.architecture.grouped import GroupedQueryAttention
from glmexport.architecture.token_prediction import mixture_at, with_token_prediction
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.checkpoint.config import ConfigReader
from glmexport.foundation.errors import CheckpointError

MODEL_TYPE = "glm4_moe"


def describe(checkpoint: Checkpoint) -> Architecture:
    """Describe pre-norm layers, the first with a gated MLP, the others with a mixture of experts.

    Half of each head rotates.

    Pairs (i, i + half) are rotated, and queries and keys may be normalised head by head before.
    """
    config = checkpoint.config
    dense = dense_architecture(checkpoint, MODEL_TYPE, sandwich_norms=False)
    normed = config.flag("use_qk_norm")
    first = config.integer("first_k_dense_replace", minimum=0)

    def described(layer: DecoderLayer, sparse: bool) -> DecoderLayer:
        rotated = _rotate_half(layer, normed)
        return replace(rotated, mlp=mixture(config, layer.prefix, dense.hidden_size)) if sparse else rotated

    layers = tuple(described(layer, layer.index >= first) for layer in dense.layers)
    ahead = dense_layer(config, len(layers))
    ahead = described(ahead, mixture_at(checkpoint, ahead.prefix))
    return with_token_prediction(replace(dense, layers=layers), checkpoint, ahead)


def _rotate_half(layer: DecoderLayer, normed: bool) -> DecoderLayer:
    attention, epsilon = layer.attention, layer.attention_norm.epsilon
    assert isinstance(attention, GroupedQueryAttention)

    def norm(name: str) -> Norm | None:
        return Norm(f"{layer.prefix}.self_attn.{name}", attention.head_dim, epsilon) if normed else None

    rotary = Rotary(attention.rotary.dimensions, interleaved=False)
    return replace(
        layer, attention=replace(attention, rotary=rotary, query_norm=norm("q_norm"), key_norm=norm("k_norm"))
    )


def mixture(config: ConfigReader, prefix: str, hidden: int) -> MixtureOfExperts:
    """Describe the mixture of experts of the layer whose keys start with ``prefix``.

    Raises:
        CheckpointError: a key is missing, or the numbers do not fit each other.
    """
    experts = config.integer("n_routed_experts", minimum=2)
    chosen = config.integer("num_experts_per_tok", minimum=1)
    groups = config.integer("n_group", minimum=1)
    kept = config.integer("topk_group", minimum=1)
    if experts % groups or experts // groups < 2 or kept > groups or chosen > experts // groups * kept:
        raise CheckpointError(
            f"{config.where}: {chosen} of {experts} experts in {kept} of {groups} groups cannot be chosen.",
            next_step="Correct n_routed_experts, num_experts_per_tok, n_group and topk_group.",
        )
    inner = config.integer("moe_intermediate_size", minimum=1)
    shared = config.integer("n_shared_experts", minimum=1)
    module = f"{prefix}.mlp"

    def mlp(name: str, size: int, parts: tuple[str, str]) -> GatedMlp:
        key = f"{module}.{name}"
        return GatedMlp(
            size,
            Linear(f"{key}.gate_up_proj", hidden, 2 * size, False, f"{name}.input", parts[0]),
            Linear(f"{key}.down_proj", size, hidden, False, f"{name}.hidden", parts[1]),
        )

    return MixtureOfExperts(
        module=module,
        router=Router(
            weight=f"{module}.gate.weight",
            bias=f"{module}.gate.e_score_correction_bias",
            in_features=hidden,
            experts=experts,
            chosen=chosen,
            groups=groups,
            kept_groups=kept,
            normalized=config.flag("norm_topk_prob"),
            scale=config.number("routed_scaling_factor"),
        ),
        experts=tuple(mlp(f"experts.{index}", inner, (EXPERT_INPUT, EXPERT_OUTPUT)) for index in range(experts)),
        shared=mlp("shared_experts", inner * shared, ("shared_gate_up", "shared_down")),
    )
