"""The common part of the families with latent attention: typed reads of their configuration, and their layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from glmexport.architecture.dense import STATIC_ROPE_TYPES
from glmexport.architecture.description import Architecture, DecoderLayer, GatedMlp, Linear, Norm, Rotary
from glmexport.architecture.glm4_moe import mixture
from glmexport.architecture.latent import Indexer, LatentAttention
from glmexport.architecture.special_tokens import SpecialTokens
from glmexport.architecture.tables import Tables
from glmexport.architecture.token_prediction import mixture_at, with_token_prediction
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.checkpoint.config import ConfigReader
from glmexport.foundation.errors import CheckpointError

#: Epsilon of the norms inside the attention, which transformers leaves at its RMSNorm's default.
_LATENT_EPSILON = 1e-6


@dataclass(frozen=True)
class LatentSizes:
    """The numbers of a config.json with latent attention; ``head_dim`` there is that of the rotary part, if present."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    query_rank: int | None
    rank: int
    nope: int
    rope: int
    value_dim: int
    vocabulary: int
    context: int
    epsilon: float
    attention_bias: bool
    interleaved: bool
    scale: float

    @classmethod
    def read(cls, config: ConfigReader, *, indexed: bool) -> LatentSizes:
        """Read and cross-check them; ``indexed``: layers have indexers.

        Raises:
            CheckpointError: a key is missing or of another type, or the activation, the rope type or the number of
                rotary dimensions is not supported.
        """
        config.choice("hidden_act", ("silu",))
        heads = config.integer("num_attention_heads", minimum=1)
        # Every head has keys and values of its own; transformers repeats them where the number is a fraction of heads,
        # and then fails.
        if heads // config.integer("num_key_value_heads", minimum=1) > 1:
            raise CheckpointError(
                f"{config.where}: num_key_value_heads is less than num_attention_heads {heads}, and latent attention "
                "has as many.",
                next_step="Use the config.json that belongs to these weights.",
            )
        nope, rope = config.integer("qk_nope_head_dim", minimum=1), config.integer("qk_rope_head_dim", minimum=2)
        if rope % 2:
            raise CheckpointError(
                f"{config.where}: qk_rope_head_dim is {rope}; pairs are rotated.",
                next_step="Use the config.json that belongs to these weights.",
            )
        return cls(
            hidden=config.integer("hidden_size", minimum=1),
            intermediate=config.integer("intermediate_size", minimum=1),
            layers=config.integer("num_hidden_layers", minimum=1),
            heads=heads,
            query_rank=config.optional_integer("q_lora_rank", minimum=1),
            rank=config.integer("kv_lora_rank", minimum=1),
            nope=nope,
            rope=rope,
            value_dim=config.integer("v_head_dim", minimum=1),
            vocabulary=config.integer("vocab_size", minimum=1),
            context=config.integer("max_position_embeddings", minimum=1),
            epsilon=config.number("rms_norm_eps", minimum=0),
            attention_bias=config.flag("attention_bias"),
            # With indexers transformers does not look at the key: pairs of neighbours are rotated.
            interleaved=indexed or config.flag("rope_interleave"),
            scale=_magnitude(config) ** 2 / math.sqrt(nope + rope),
        )


def _magnitude(config: ConfigReader) -> float:
    """YaRN's correction of the scores (arXiv 2309.00071, as DeepSeek applies it): 0.1 mscale_all_dim ln(factor) + 1."""
    for section in ("rope_parameters", "rope_scaling"):
        if not config.has(section):
            continue
        rope = config.section(section)
        key = "rope_type" if rope.has("rope_type") else "type"
        kind = rope.choice(key, STATIC_ROPE_TYPES) if rope.has(key) else "default"
        if rope.number("partial_rotary_factor", default=1.0) != 1:
            raise CheckpointError(
                f"{rope.where}: partial_rotary_factor is not 1; all of qk_rope_head_dim is rotated.",
                next_step="Use the config.json that belongs to these weights.",
            )
        every = rope.number("mscale_all_dim", default=0.0)
        if kind == "default" or not every:
            return 1.0
        factor = rope.number("factor")
        return 0.1 * every * math.log(factor) + 1 if factor > 1 else 1.0
    return 1.0


@dataclass(frozen=True)
class IndexerPlan:
    """The indexer's sizes, and for every layer whether it has its own (``full``) or follows the one before."""

    heads: int
    head_dim: int
    top_k: int
    full: tuple[bool, ...]


def latent_architecture(
    checkpoint: Checkpoint, family: str, sparse: Callable[[int], bool], indexers: IndexerPlan | None = None
) -> Architecture:
    """Describe a decoder of pre-norm layers with latent attention.

    ``sparse`` tells which layers are mixtures of experts.

    Raises:
        CheckpointError: the configuration is not what such a family has.
    """
    config = checkpoint.config
    sizes = LatentSizes.read(config, indexed=indexers is not None)

    def described(index: int, sparse: bool, indexers: IndexerPlan | None) -> DecoderLayer:
        layer = _layer(sizes, index, indexers)
        return replace(layer, mlp=mixture(config, layer.prefix, sizes.hidden)) if sparse else layer

    layers = [described(index, sparse(index), indexers) for index in range(sizes.layers)]
    # A layer behind the last one selects by itself, if at all: in none of the published models does it share.
    ahead, own = f"model.layers.{sizes.layers}", None
    if indexers is not None:
        own = replace(indexers, full=(*indexers.full, True))
    special = SpecialTokens.read(checkpoint, sizes.vocabulary)
    tables = Tables.find(checkpoint)
    model = Architecture(
        family=family,
        hidden_size=sizes.hidden,
        vocabulary_size=sizes.vocabulary,
        context_length=sizes.context,
        embedding=f"{tables.embedding}.weight",
        layers=tuple(layers),
        final_norm=Norm("model.norm", sizes.hidden, sizes.epsilon),
        lm_head=tables.head(sizes.hidden, sizes.vocabulary),
        tied=tables.tied,
        bos_token_id=special.begin,
        eos_token_ids=special.ends,
        pad_token_id=special.fill,
        unused=tables.unused,
    )
    return with_token_prediction(model, checkpoint, described(sizes.layers, mixture_at(checkpoint, ahead), own))


def _layer(sizes: LatentSizes, index: int, indexers: IndexerPlan | None) -> DecoderLayer:
    prefix = f"model.layers.{index}"
    width = sizes.intermediate
    return DecoderLayer(
        index=index,
        prefix=prefix,
        attention_norm=Norm(f"{prefix}.input_layernorm", sizes.hidden, sizes.epsilon),
        attention=_attention(sizes, f"{prefix}.self_attn", index, indexers),
        attention_output_norm=None,
        mlp_norm=Norm(f"{prefix}.post_attention_layernorm", sizes.hidden, sizes.epsilon),
        mlp=GatedMlp(
            intermediate_size=width,
            gate_up=Linear(f"{prefix}.mlp.gate_up_proj", sizes.hidden, 2 * width, False, "mlp_input", "gate_up"),
            down=Linear(f"{prefix}.mlp.down_proj", width, sizes.hidden, False, "mlp_hidden", "down"),
        ),
        mlp_output_norm=None,
    )


def _attention(sizes: LatentSizes, prefix: str, index: int, indexers: IndexerPlan | None) -> LatentAttention:
    hidden, biased, latent = sizes.hidden, sizes.attention_bias, sizes.query_rank
    query_size = sizes.heads * (sizes.nope + sizes.rope)
    rotary = Rotary(sizes.rope, sizes.interleaved)
    full = indexers is not None and indexers.full[index]
    down = (
        None
        if latent is None
        else Linear(f"{prefix}.q_a_proj", hidden, latent, biased, tap="attention_input", part="q_a")
    )
    query = (
        Linear(f"{prefix}.q_proj", hidden, query_size, False, tap="attention_input", part="q_b")
        if latent is None
        else Linear(f"{prefix}.q_b_proj", latent, query_size, False, tap="query_latent", part="q_b")
    )
    return LatentAttention(
        heads=sizes.heads,
        nope=sizes.nope,
        value_dim=sizes.value_dim,
        rank=sizes.rank,
        rotary=rotary,
        scale=sizes.scale,
        query_down=down,
        query_norm=None if latent is None else Norm(f"{prefix}.q_a_layernorm", latent, _LATENT_EPSILON),
        query=query,
        down=Linear(
            f"{prefix}.kv_a_proj_with_mqa", hidden, sizes.rank + sizes.rope, biased, tap="attention_input", part="kv_a"
        ),
        latent_norm=Norm(f"{prefix}.kv_a_layernorm", sizes.rank, _LATENT_EPSILON),
        key_value=Linear(
            f"{prefix}.kv_b_proj",
            sizes.rank,
            sizes.heads * (sizes.nope + sizes.value_dim),
            False,
            tap="key_value_latent",
            part="kv_b",
        ),
        output=Linear(
            f"{prefix}.o_proj", sizes.heads * sizes.value_dim, hidden, biased, tap="attention_output", part="o"
        ),
        indexer=_indexer(sizes, f"{prefix}.indexer", indexers, rotary) if indexers is not None and full else None,
        shared_selection=indexers is not None and not full,
    )


def _indexer(sizes: LatentSizes, prefix: str, plan: IndexerPlan, rotary: Rotary) -> Indexer:
    def linear(name: str, inputs: int, outputs: int, tap: str) -> Linear:
        return Linear(f"{prefix}.{name}", inputs, outputs, False, tap, part="indexer")

    assert sizes.query_rank is not None
    return Indexer(
        heads=plan.heads,
        head_dim=plan.head_dim,
        top_k=plan.top_k,
        # In the indexer always pairs of neighbours.
        rotary=Rotary(rotary.dimensions, interleaved=True),
        query=linear("wq_b", sizes.query_rank, plan.heads * plan.head_dim, "query_latent"),
        key=linear("wk", sizes.hidden, plan.head_dim, "attention_input"),
        key_norm=f"{prefix}.k_norm",
        key_epsilon=1e-6,
        head_weights=linear("weights_proj", sizes.hidden, plan.heads, "attention_input"),
    )


def every_layer(config: ConfigReader, key: str, kinds: Sequence[str], layers: int) -> tuple[str, ...]:
    """Return one of ``kinds`` for each of ``layers``.

    Raises:
        CheckpointError: the configuration has another list under ``key``.
    """
    given = config.texts(key)
    if len(given) != layers or not set(given) <= set(kinds):
        raise CheckpointError(
            f"{config.where}: {key} must have {' or '.join(kinds)} for each of the {layers} layers.",
            next_step="Use the config.json that belongs to these weights.",
        )
    return tuple(given)
