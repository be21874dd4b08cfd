"""The common part of the dense families: typed reads of their configuration, and the layer both are variations of."""

from __future__ import annotations

from dataclasses import dataclass

from glmexport.architecture.description import Architecture, DecoderLayer, GatedMlp, Linear, Norm, Rotary
from glmexport.architecture.grouped import GroupedQueryAttention
from glmexport.architecture.special_tokens import SpecialTokens
from glmexport.architecture.tables import Tables
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.checkpoint.config import ConfigReader
from glmexport.foundation.errors import CheckpointError

#: Rope types whose tables do not depend on the length of the text at hand.
STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class DenseSizes:
    """The numbers of a dense GLM's config.json."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    epsilon: float
    rotary_dimensions: int
    attention_bias: bool

    @classmethod
    def read(cls, config: ConfigReader) -> DenseSizes:
        """Read and cross-check them.

        Raises:
            CheckpointError: a key is missing or of another type, or the activation or rope type is not supported.
        """
        config.choice("hidden_act", ("silu",))
        hidden = config.integer("hidden_size", minimum=1)
        heads = config.integer("num_attention_heads", minimum=1)
        kv_heads = config.integer("num_key_value_heads", minimum=1)
        head_dim = config.integer("head_dim", default=hidden // heads, minimum=2)
        if heads % kv_heads:
            raise CheckpointError(
                f"{config.where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}.",
                next_step="Use the config.json that belongs to these weights.",
            )
        rotary_dimensions = int(head_dim * _partial_rotary_factor(config))
        if rotary_dimensions % 2 or not 0 < rotary_dimensions <= head_dim:
            raise CheckpointError(
                f"{config.where}: {rotary_dimensions} rotary dimensions in a head of {head_dim}; pairs are rotated.",
                next_step="Check head_dim and partial_rotary_factor.",
            )
        return cls(
            hidden=hidden,
            intermediate=config.integer("intermediate_size", minimum=1),
            layers=config.integer("num_hidden_layers", minimum=1),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=config.integer("vocab_size", minimum=1),
            context=config.integer("max_position_embeddings", minimum=1),
            epsilon=config.number("rms_norm_eps", minimum=0),
            rotary_dimensions=rotary_dimensions,
            attention_bias=config.flag("attention_bias"),
        )


def refuse_rope_type(config: ConfigReader) -> None:
    """Check the rope type, wherever a configuration has it.

    Raises:
        CheckpointError: its tables depend on the length of the text at hand.
    """
    for section in ("rope_parameters", "rope_scaling"):
        rope = config.section(section) if config.has(section) else None
        for key in ("rope_type", "type"):
            if rope is not None and rope.has(key):
                rope.choice(key, STATIC_ROPE_TYPES)


def _partial_rotary_factor(config: ConfigReader) -> float:
    """Read it from where transformers 4 (top level) or 5 (rope_parameters) writes it, and check the rope type."""
    for section in ("rope_parameters", "rope_scaling"):
        if config.has(section) and config.values[section] is not None:
            rope = config.section(section)
            key = "rope_type" if rope.has("rope_type") else "type"
            if rope.has(key):
                rope.choice(key, STATIC_ROPE_TYPES)
            if rope.has("partial_rotary_factor"):
                return rope.number("partial_rotary_factor")
    return config.number("partial_rotary_factor")


def dense_architecture(checkpoint: Checkpoint, family: str, *, sandwich_norms: bool) -> Architecture:
    """Describe a dense GLM; with ``sandwich_norms``, attention and MLP outputs are normalised before they are added."""
    sizes = DenseSizes.read(checkpoint.config)
    special = SpecialTokens.read(checkpoint, sizes.vocabulary)
    tables = Tables.find(checkpoint)
    return Architecture(
        family=family,
        hidden_size=sizes.hidden,
        vocabulary_size=sizes.vocabulary,
        context_length=sizes.context,
        embedding=f"{tables.embedding}.weight",
        layers=tuple(_layer(sizes, index, sandwich_norms) for index in range(sizes.layers)),
        final_norm=Norm("model.norm", sizes.hidden, sizes.epsilon),
        lm_head=tables.head(sizes.hidden, sizes.vocabulary),
        tied=tables.tied,
        bos_token_id=special.begin,
        eos_token_ids=special.ends,
        pad_token_id=special.fill,
        unused=tables.unused,
    )


def dense_layer(config: ConfigReader, index: int) -> DecoderLayer:
    """Describe layer ``index`` of a dense GLM without sandwich norms, also one behind the model's last."""
    return _layer(DenseSizes.read(config), index, sandwich_norms=False)


def _layer(sizes: DenseSizes, index: int, sandwich_norms: bool) -> DecoderLayer:
    prefix = f"model.layers.{index}"

    def norm(name: str) -> Norm:
        return Norm(f"{prefix}.{name}", sizes.hidden, sizes.epsilon)

    def projection(name: str, heads: int) -> Linear:
        key = f"{prefix}.self_attn.{name}"
        return Linear(key, sizes.hidden, heads * sizes.head_dim, sizes.attention_bias, "attention_input", "qkv")

    return DecoderLayer(
        index=index,
        prefix=prefix,
        attention_norm=norm("input_layernorm"),
        attention=GroupedQueryAttention(
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            rotary=Rotary(sizes.rotary_dimensions, interleaved=True),
            query=projection("q_proj", sizes.heads),
            key=projection("k_proj", sizes.kv_heads),
            value=projection("v_proj", sizes.kv_heads),
            output=Linear(
                f"{prefix}.self_attn.o_proj",
                sizes.heads * sizes.head_dim,
                sizes.hidden,
                bias=False,
                tap="attention_output",
                part="o",
            ),
        ),
        attention_output_norm=norm("post_self_attn_layernorm") if sandwich_norms else None,
        mlp_norm=norm("post_attention_layernorm"),
        mlp=GatedMlp(
            intermediate_size=sizes.intermediate,
            gate_up=Linear(
                f"{prefix}.mlp.gate_up_proj",
                sizes.hidden,
                2 * sizes.intermediate,
                False,
                "mlp_input",
                "gate_up",
            ),
            down=Linear(f"{prefix}.mlp.down_proj", sizes.intermediate, sizes.hidden, False, "mlp_hidden", "down"),
        ),
        mlp_output_norm=norm("post_mlp_layernorm") if sandwich_norms else None,
    )
