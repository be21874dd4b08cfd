"""The reading of a config.json by transformers, and its model without storage, which a declaration has to equal.

A default that is ours, or a key that is read otherwise, would describe another model than the one transformers loads.
So a family's declaration is given the configuration as transformers completes it, and the shapes, rotary widths,
epsilons and scales that it declares are compared with those of transformers' modules on the meta device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from glmexport.architecture.dense import refuse_rope_type
from glmexport.architecture.description import Architecture
from glmexport.architecture.tables import EMBEDDING, LM_HEAD
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.checkpoint.config import ConfigReader
from glmexport.foundation.errors import CheckpointError
from glmexport.reference.filling import stacked_halves

#: Keys that end, begin and fill a text. The files alone say them: a class's default is of another vocabulary.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NEXT_STEP = "Use the config.json that belongs to these weights."


def completed_checkpoint(checkpoint: Checkpoint) -> tuple[Checkpoint, Any]:
    """Return ``checkpoint`` with its configuration as transformers completes it, and transformers' configuration.

    Raises:
        CheckpointError: transformers refuses the configuration, or its rope type is not supported.
    """
    from transformers import CONFIG_MAPPING

    given = checkpoint.config
    refuse_rope_type(given)
    try:
        config: Any = CONFIG_MAPPING[checkpoint.model_type].from_dict(copy.deepcopy(dict(given.values)))
        read = {key: value for key, value in config.to_dict().items() if value is not None and key not in _TOKENS}
    except MemoryError:
        raise
    # Each class checks in its own way, by errors that have no base in common.
    except Exception as error:
        raise CheckpointError(
            f"{given.where}: transformers does not read it: {_reason(error)}.", next_step=_NEXT_STEP
        ) from error
    return checkpoint.configured(ConfigReader({**given.values, **read}, given.where, given.otherwise)), config


def skeleton(config: Any) -> nn.Module:
    """Return transformers' causal language model of ``config`` on the meta device, fp32, whose experts run one by one.

    Raises:
        CheckpointError: transformers does not make one.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    # The implementation that takes one expert after another, so that each can be read when its turn comes.
    config._experts_implementation = "eager"
    # No row of the embedding is another for it, and whether it is in the vocabulary is not asked here.
    config.pad_token_id = None
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=False
            )
    except MemoryError:
        raise
    # Whatever a size that fits no other leads to in modules that were not written for it.
    except Exception as error:
        raise CheckpointError(
            f"config.json: transformers makes no model of it: {_reason(error)}.", next_step=_NEXT_STEP
        ) from error
    return model.eval().requires_grad_(False)


def require_agreement(architecture: Architecture, model: nn.Module, where: str) -> None:
    """Check that ``architecture`` describes transformers' ``model``: every shape, rotary width, epsilon and scale.

    Raises:
        CheckpointError: it does not; ``where`` is the file that both were read from.
    """
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = _named_as_in(architecture, theirs)
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if ours.get(name) != theirs.get(name):
            _refuse(where, name, "shape", ours.get(name), theirs.get(name))
    for name, what, value, expected in _numbers(architecture, model):
        if not math.isclose(value, expected, rel_tol=1e-6):
            _refuse(where, name, what, value, expected)


def _refuse(where: str, name: str, what: str, ours: object, theirs: object) -> None:
    def shown(value: object) -> str:
        return "none" if value is None else str(list(value)) if isinstance(value, tuple) else f"{value:g}"

    raise CheckpointError(
        f"{where}: the {what} of {name} is {shown(theirs)} in transformers, and {shown(ours)} as glmexport reads it.",
        next_step="Write the key that decides it into config.json as the model was trained, or use the config.json "
        "that belongs to these weights.",
    )


def _named_as_in(architecture: Architecture, theirs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes by the names of transformers' tensors: stacks of experts, halves of stacked matrices, both tables."""
    shapes = architecture.shapes()
    table = shapes.pop(architecture.embedding)
    head = shapes.pop(architecture.lm_head.weight, table)
    found: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": table, f"{LM_HEAD}.weight": head}
    for layer in architecture.layers:
        pages = layer.mlp.pages
        for key, (stack, index) in pages.items():
            found[stack] = (index + 1, *shapes.pop(key))
        for half, (key, _) in stacked_halves(layer).items():
            name = f"{layer.prefix}.{half}"
            if key in shapes and name in theirs:
                found[name] = (shapes[key][0] // 2, *shapes[key][1:])
        for key, parts in layer.mlp.stacks.items():
            if parts[0] in found:
                shapes.pop(key)
    return found | shapes


def _numbers(architecture: Architecture, model: nn.Module) -> Iterator[tuple[str, str, float, float]]:
    """Module, what it is, ours, transformers'."""
    decoder: Any = model.get_submodule("model")
    for layer in architecture.layers:
        width = 2 * decoder.rotary_emb.inv_freq.numel()
        yield layer.prefix, "number of rotary dimensions", layer.attention.rotary.dimensions, width
        attention: Any = model.get_submodule(f"{layer.prefix}.self_attn")
        yield layer.prefix, "scale of the scores", layer.attention.scale, attention.scaling
        for norm in layer.norms:
            yield norm.key, "epsilon", norm.epsilon, _epsilon(model, norm.key)
    yield architecture.final_norm.key, "epsilon", architecture.final_norm.epsilon, _epsilon(model, "model.norm")


def _epsilon(model: nn.Module, key: str) -> float:
    norm: Any = model.get_submodule(key)
    epsilon: float = norm.variance_epsilon
    return epsilon


def _reason(error: Exception) -> str:
    """The last line of a message, which tells what is wrong; the ones before it tell where in the library."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")[:300]
