"""The declaration of a checkpoint, held against transformers' own reading of it."""

from __future__ import annotations

from glmexport.architecture.counts import refuse_counts
from glmexport.architecture.description import Architecture
from glmexport.architecture.registry import FAMILIES, MULTIMODAL, UNFINISHED
from glmexport.architecture.rope import check_rope
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError
from glmexport.reference.skeleton import completed_checkpoint, require_agreement, skeleton


def describe(checkpoint: Checkpoint) -> Architecture:
    """Return the architecture of ``checkpoint`` as transformers reads it; no weight but tied tables is read.

    Raises:
        CheckpointError: no declaration for its ``model_type``, its configuration is not what the family has, or the
            declaration does not describe what transformers makes of it.
    """
    if checkpoint.model_type in UNFINISHED:
        parts = UNFINISHED[checkpoint.model_type](checkpoint)
        raise CheckpointError(
            f"{checkpoint.name}: {checkpoint.model_type!r} cannot be built yet. Missing: {'; '.join(parts)}.",
            next_step=f"Supported: {', '.join(sorted(FAMILIES))}.",
        )
    family = FAMILIES.get(checkpoint.model_type)
    if family is None and (MULTIMODAL.fullmatch(checkpoint.model_type) or checkpoint.config.has("text_config")):
        config = checkpoint.config
        text = config.section("text_config").values.get("model_type") if config.has("text_config") else None
        raise CheckpointError(
            f"{checkpoint.name}: model_type {checkpoint.model_type!r} reads more than text, and only text models are "
            "exported" + (f"; its text-only part is {text!r}." if isinstance(text, str) else "."),
            next_step=f"Use the text-only model of the series ({', '.join(sorted(FAMILIES))}).",
        )
    if family is None:
        raise CheckpointError(
            f"{checkpoint.name}: there is no declaration for model_type {checkpoint.model_type!r}.",
            next_step=f"Supported: {', '.join(sorted(FAMILIES))}.",
        )
    refuse_counts(checkpoint)
    check_rope(checkpoint.config)
    try:
        read, config = completed_checkpoint(checkpoint)
    except CheckpointError:
        # What is wrong with a value that is there, the declaration says more plainly than transformers.
        family(checkpoint)
        raise
    architecture = family(read)
    require_agreement(architecture, skeleton(config), checkpoint.config.where)
    return architecture
