"""Counts of a configuration that decide how much is described, held against what the files have."""

from __future__ import annotations

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError

_LAYERS = ("num_hidden_layers", "num_nextn_predict_layers", "num_mtp_layers")
_EXPERTS = ("n_routed_experts",)
#: Every expert of a layer is two tensors or more, or a place in two stacks. Layers without experts, which no key
#: tells apart in all families, are counted as if they had some.
_SLACK = 4
#: Layers, and experts of all layers, that are described in any case: a model of dense layers may keep the key.
_FREE_LAYERS, _FREE = 2**10, 2**16


def refuse_counts(checkpoint: Checkpoint) -> None:
    """Refuse more layers or experts than the tensors can be those of, before any of them is described.

    Raises:
        CheckpointError: there are more; names the file and the key.
    """
    tensors = checkpoint.tensors
    stacked = sum(min(entry.shape[0], entry.elements) for entry in tensors.values() if len(entry.shape) == 3)
    layers = 1
    for key in _LAYERS:
        layers = max(layers, _count(checkpoint, key, max(_FREE_LAYERS, len(tensors))))
    for key in _EXPERTS:
        _count(checkpoint, key, max(_FREE, _SLACK * (len(tensors) + stacked)) // layers)


def _count(checkpoint: Checkpoint, key: str, most: int) -> int:
    config = checkpoint.config
    # Of another type it is the family's to refuse, if the family reads it.
    value = config.values.get(key)
    count = value if type(value) is int else 0
    if count > most:
        raise CheckpointError(
            f"{config.where}: {key} is {str(count)[:20]}, and the checkpoint has {len(checkpoint.tensors)} tensors.",
            next_step="Use the config.json that belongs to these weights, or download the checkpoint again.",
        )
    return count
