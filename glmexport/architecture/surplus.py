"""Tensors that a checkpoint has and transformers does not read, in every family: which of them are harmless, and why.

What could be meant to be part of the model is none of them: a bias that is not zero, a norm or matrix of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from glmexport.checkpoint.checkpoint import Checkpoint

if TYPE_CHECKING:
    from glmexport.architecture.description import DecoderLayer

_ROTARY = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq")
#: Modules that are built around a language model: towers that see or hear, and the heads of reward models.
_ELSEWHERE = re.compile(
    r"(model\.)?(visual|vision_tower|vision_model|audio_tower|multi_modal_projector)\..+|(v_head|score|value_head)\..+"
)


def harmless_keys(
    checkpoint: Checkpoint,
    keys: Iterable[str],
    layers: Iterable[DecoderLayer],
    wanted: Collection[str],
    stacked: Iterable[str],
) -> Iterator[tuple[str, str]]:
    """Yield (key, reason) of each of ``keys`` that no answer depends on.

    Args:
        checkpoint: What has them; biases are read.
        keys: Tensors that no declaration asks for.
        layers: Of the model.
        wanted: Tensors that the declaration asks for.
        stacked: Keys of the halves of stacked matrices.

    Raises:
        CheckpointError: a bias cannot be read.
    """
    shared = tuple(f"{layer.prefix}.self_attn.indexer." for layer in layers if layer.attention.shared_selection)
    weights = {*wanted, *stacked}
    for key in keys:
        if _ROTARY.fullmatch(key):
            yield key, "recomputed from config.json"
        elif key.startswith(shared):
            yield key, "the layer attends to the selection of the layer before; it has no indexer of its own"
        elif _ELSEWHERE.fullmatch(key):
            yield key, "belongs to no part of a language model"
        elif key.endswith(".bias") and f"{key.removesuffix('bias')}weight" in weights and _is_zero(checkpoint, key):
            yield key, "a bias of zeros, which adds nothing"


def _is_zero(checkpoint: Checkpoint, key: str) -> bool:
    return len(checkpoint.shape(key)) == 1 and not bool(checkpoint.read(key).any())
