"""What a loop reads to run the bundle: that of onnxruntime-genai, or ours where latents are cached or shapes fixed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from glmexport.architecture.description import Architecture, DecoderLayer
from glmexport.architecture.latent import LatentAttention
from glmexport.architecture.token_prediction import TokenPrediction
from glmexport.bundle.genai_config import session_options
from glmexport.bundle.loop import (
    LOOP_CONFIG,
    DraftConfig,
    FixedLoopConfig,
    LoopConfig,
)
from glmexport.bundle.names import (
    ASKED,
    ATTENTION_MASK,
    DRAFT,
    GENAI_CONFIG,
    HIDDEN,
    INDEX,
    INPUT_IDS,
    INPUTS,
    LATENT,
    LOGITS,
    MODEL,
    OUTPUTS,
    PAST,
    PAST_HIDDEN,
    POSITION_IDS,
    PRESENT,
    SHORT_STEP,
    STEP,
)
from glmexport.foundation.target import GraphLimits, Target
from glmexport.graph.caches import own_loop
from glmexport.graph.fixed import fixed_sizes

#: What the caches of a program that asks for no length may take. onnxruntime-genai makes them for ``max_length`` tokens
#: before it reads the first one; a small machine has as much beside the weights.
DEFAULT_CACHE_BYTES = 2**30
#: Tokens that it gets in any case.
_LEAST_LENGTH = 1024
_CACHE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}


def loop_config(architecture: Architecture, target: Target) -> tuple[str, dict[str, Any]]:
    """Name and content of the loop's file.

    onnxruntime-genai knows no cache but keys and values of heads, which grow or are its own; a bundle with another one
    gets no file of its.
    """
    if target.graph.static_shapes:
        return LOOP_CONFIG, _fixed_config(architecture, target).model_dump(mode="json")
    if not own_loop(architecture, target.graph):
        return GENAI_CONFIG, genai_config(architecture, target)
    draft = architecture.token_prediction
    config = LoopConfig(
        graph=MODEL,
        provider=target.provider,
        session=target.session,
        context_length=architecture.context_length,
        eos_token_id=architecture.eos_token_ids,
        input_ids=INPUT_IDS,
        attention_mask=ATTENTION_MASK,
        logits=LOGITS,
        caches=_latent_caches(architecture.layers),
        short_step=SHORT_STEP,
        hidden=HIDDEN if draft else None,
        draft=_draft_config(draft) if draft else None,
    )
    return LOOP_CONFIG, config.model_dump(mode="json")


def _draft_config(draft: TokenPrediction) -> DraftConfig:
    return DraftConfig(
        graph=DRAFT,
        input_ids=INPUT_IDS,
        attention_mask=ATTENTION_MASK,
        past_hidden=PAST_HIDDEN,
        logits=LOGITS,
        hidden=HIDDEN,
        caches=_latent_caches([draft.layer]),
    )


def _fixed_config(architecture: Architecture, target: Target) -> FixedLoopConfig:
    sizes = fixed_sizes(architecture, target.graph)
    return FixedLoopConfig(
        graph=MODEL,
        provider=target.provider,
        session=target.session,
        context_length=sizes.capacity,
        eos_token_id=architecture.eos_token_ids,
        input_ids=INPUT_IDS,
        chunk=sizes.chunk,
        step_graph=STEP,
        position_ids=POSITION_IDS,
        asked_position=ASKED,
        logits=LOGITS,
        caches=_caches((layer.index, kind) for layer in architecture.layers for kind in ("key", "value")),
    )


def _latent_caches(layers: Iterable[DecoderLayer]) -> dict[str, str]:
    return _caches(
        (layer.index, kind) for layer in layers for kind in ((LATENT, INDEX) if layer.attention.attended else (LATENT,))
    )


def _caches(kinds: Iterable[tuple[int, str]]) -> dict[str, str]:
    return {PAST.format(layer=at, kind=kind): PRESENT.format(layer=at, kind=kind) for at, kind in kinds}


def default_length(context_length: int, values_per_token: int, limits: GraphLimits) -> int:
    """``max_length`` for programs that name none: the context, or a power of two whose caches a small machine holds.

    Args:
        context_length: tokens that the graph can take.
        values_per_token: numbers that all caches hold of one.
        limits: in which type they are.
    """
    kind = limits.activations if limits.kv_cache == "activations" else limits.kv_cache
    held = DEFAULT_CACHE_BYTES * 8 // (values_per_token * _CACHE_BITS[kind])
    return min(context_length, max(_LEAST_LENGTH, 1 << max(held, 1).bit_length() - 1))


def genai_config(architecture: Architecture, target: Target) -> dict[str, Any]:
    """Configuration for model type ``decoder``, onnxruntime-genai's generic decoder-only loop."""
    attention = architecture.layers[0].attention
    # Latent attention comes here as attention over plain heads.
    if isinstance(attention, LatentAttention):
        heads, size = attention.heads, attention.padded_head_dim
    else:
        heads, size = attention.kv_heads, attention.head_dim
    return {
        "model": {
            "type": "decoder",
            "context_length": architecture.context_length,
            "vocab_size": architecture.vocabulary_size,
            "bos_token_id": architecture.bos_token_id
            if architecture.bos_token_id is not None
            else architecture.pad_token_id,
            "eos_token_id": list(architecture.eos_token_ids),
            "pad_token_id": architecture.pad_token_id,
            "decoder": {
                "filename": MODEL,
                "session_options": session_options(target),
                "hidden_size": architecture.hidden_size,
                "head_size": size,
                "num_attention_heads": attention.heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": len(architecture.layers),
                "inputs": INPUTS,
                "outputs": OUTPUTS,
            },
        },
        "search": {
            "do_sample": False,
            # Whoever names a length, as every loop of glmexport does, gets up to the whole context.
            "max_length": default_length(
                architecture.context_length, 2 * len(architecture.layers) * heads * size, target.graph
            ),
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
