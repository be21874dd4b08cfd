"""The place of every tensor of an adapter. Each has exactly one place in the base, or is refused by its name.

The names in an adapter's file, where MODULE and TENSOR are names in the base:

    base_model.model.MODULE.lora_A.weight, .lora_B.weight      update of a linear
    base_model.model.MODULE.lora_embedding_A, _B               update of an embedding
    base_model.model.MODULE.lora_magnitude_vector              its magnitude, with DoRA
    base_model.model.MODULE.base_layer.weight, .bias           replaces, where MODULE is updated as well
    base_model.model.TENSOR                                    replaces: modules_to_save, trained biases
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from glmexport.checkpoint.adapter_config import MERGE_WITH_PEFT, AdapterConfig
from glmexport.checkpoint.header import TensorEntry
from glmexport.checkpoint.low_rank import LowRank
from glmexport.foundation.errors import CheckpointError

_PREFIX = "base_model.model."
_UPDATE = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)")
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<tensor>weight|bias)")
_MAGNITUDE = "lora_magnitude_vector"
_OTHER_BASE = "Give the checkpoint that the adapter was trained on."


def assign(
    tensors: Mapping[str, TensorEntry], config: AdapterConfig, base: Mapping[str, TensorEntry], path: Path
) -> tuple[dict[str, TensorEntry], dict[str, LowRank]]:
    """Give every tensor of an adapter its place.

    Args:
        tensors: The adapter's, by their names in its file.
        config: What they mean.
        base: The tensors of the checkpoint, by name.
        path: The adapter's file, for the messages.

    Returns:
        The tensors that stand in for those of the base, and the low-rank updates, both by the name in the base. An
        update's base is the tensor that stands in, where there is one.

    Raises:
        CheckpointError: a tensor has no place, two have the same, one that the configuration promises is not there,
            or a shape is not that of the base; names the file and the tensor.
    """
    replaced: dict[str, TensorEntry] = {}
    parts: dict[str, dict[str, TensorEntry]] = {}
    wrapped: dict[str, str] = {}
    for name, entry in tensors.items():
        key = name.removeprefix(_PREFIX)
        if update := _UPDATE.fullmatch(key):
            parts.setdefault(update["module"], {})[update["part"]] = entry
        elif layer := _BASE_LAYER.fullmatch(key):
            key = f"{layer['module']}.{layer['tensor']}"
            wrapped[layer["module"]] = name
        if not name.startswith(_PREFIX) or (update is None and (key not in base or key in replaced)):
            raise _unknown(path, name)
        if update is None:
            replaced[key] = entry
    for module, name in wrapped.items():
        if module not in parts:
            raise _unknown(path, name)
    for key, entry in replaced.items():
        if entry.shape != base[key].shape:
            raise _misshapen(entry, f"{list(base[key].shape)}, that of {key!r} in the checkpoint")
    updates = {}
    for module, found in parts.items():
        if f"{_PREFIX}{module}.weight" in tensors:
            # PEFT has no place for it either: it saves that of an updated module as base_layer.weight.
            raise _unknown(path, f"{_PREFIX}{module}.weight")
        updates[f"{module}.weight"] = _update(module, found, config, {**base, **replaced}, path)
    _check_complete(config, base, replaced, updates, path)
    return replaced, updates


def _update(
    module: str, parts: dict[str, TensorEntry], config: AdapterConfig, base: Mapping[str, TensorEntry], path: Path
) -> LowRank:
    key = f"{module}.weight"
    if key not in base:
        tied = " The head of a model with tied embeddings is not a tensor of its own, and cannot be updated alone."
        raise CheckpointError(
            f"{path} updates {module!r}, which the checkpoint does not have.",
            next_step=_OTHER_BASE + (tied if module.endswith("lm_head") else ""),
        )
    if not config.targets(module):
        raise CheckpointError(
            f"{path} updates {module!r}, which {config.where} does not target, so that PEFT would leave it out.",
            next_step="Use the two files of one adapter: save or download it again.",
        )
    embedding = any(part.startswith("lora_embedding") for part in parts)
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    wanted = (*names, _MAGNITUDE) if config.dora else names
    for part in wanted:
        if part not in parts:
            raise CheckpointError(
                f"{path} lacks tensor '{_PREFIX}{module}.{part}', without which {module!r} cannot be merged.",
                next_step="Save or download the adapter again.",
            )
    for part, entry in parts.items():
        if part not in wanted:
            raise _unknown(path, entry.name)
    a, b = (parts[name] for name in names)
    if len(base[key].shape) != 2:
        raise _misshapen(a, f"none, because {key!r} of shape {list(base[key].shape)} is no matrix")
    rank = config.rank_of(module)
    if len(a.shape) != 2 or a.shape[0] != rank:
        raise _misshapen(a, f"[{rank}, ...], because {config.where} gives {module!r} the rank {rank}")
    update = LowRank(base[key], a, b, parts.get(_MAGNITUDE), config.scale_of(module), embedding)
    for entry, shape in zip(update.entries, update.shapes(), strict=True):
        if entry.shape != shape:
            raise _misshapen(entry, f"{list(shape)}, because {key!r} has {list(base[key].shape)}")
    return update


def _check_complete(
    config: AdapterConfig,
    base: Mapping[str, TensorEntry],
    replaced: Mapping[str, TensorEntry],
    updates: Mapping[str, LowRank],
    path: Path,
) -> None:
    """Check that everything is there that was trained according to the configuration."""
    if not updates and not replaced:
        raise CheckpointError(f"{path} has no tensors.", next_step="Save or download the adapter again.")
    for key in base:
        module, _, tensor = key.rpartition(".")
        trained = config.bias == "all" or (config.bias == "lora_only" and f"{module}.weight" in updates)
        if tensor == "bias" and trained and key not in replaced:
            raise _untold(path, key, f"bias is {config.bias!r}", config)
    for name in config.modules_to_save:
        # A module is saved with everything below it.
        if not any(f"{name}." in key for key in replaced):
            raise _untold(path, name, "modules_to_save names it", config)


def _untold(path: Path, what: str, why: str, config: AdapterConfig) -> CheckpointError:
    return CheckpointError(
        f"{path} has no tensor of {what!r}, which was trained: {why} in {config.where}.",
        next_step="Save the adapter again with a current PEFT, or download it again.",
    )


def _unknown(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has tensor {name!r}, which has no place in the checkpoint.",
        next_step=f"{_OTHER_BASE} If it is that one, {MERGE_WITH_PEFT}.",
    )


def _misshapen(entry: TensorEntry, needed: str) -> CheckpointError:
    return CheckpointError(
        f"{entry.path}: tensor {entry.name!r} has shape {list(entry.shape)}, and needed is {needed}.",
        next_step=f"{_OTHER_BASE} If the vocabulary was resized, {MERGE_WITH_PEFT}.",
    )
