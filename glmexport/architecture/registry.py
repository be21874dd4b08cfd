"""Which declaration describes a checkpoint: by ``model_type`` in its config.json, never by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from glmexport.architecture import glm, glm4, glm4_moe_lite, glm_moe_dsa
from glmexport.architecture.description import Architecture
from glmexport.checkpoint import Checkpoint
from glmexport.errors import CheckpointError

FAMILIES: Mapping[str, Callable[[Checkpoint], Architecture]] = {
    family.MODEL_TYPE: family.describe for family in (glm, glm4, glm4_moe_lite, glm_moe_dsa)
}


def describe(checkpoint: Checkpoint) -> Architecture:
    """The architecture of ``checkpoint``.

    Raises:
        CheckpointError: no declaration for its ``model_type``, or its configuration is not what the family has.
    """
    family = FAMILIES.get(checkpoint.model_type)
    if family is None:
        raise CheckpointError(
            f"{checkpoint.name}: there is no declaration for model_type {checkpoint.model_type!r}.",
            next_step=f"Supported: {', '.join(sorted(FAMILIES))}.",
        )
    return family(checkpoint)
