"""Which declaration describes a checkpoint: by ``model_type`` in its config.json, never by its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from glmexport.architecture import glm, glm4, glm4_moe, glm4_moe_lite, glm5_next, glm_moe_dsa
from glmexport.architecture.counts import refuse_counts
from glmexport.architecture.description import Architecture
from glmexport.architecture.rope import check_rope
from glmexport.architecture.skeleton import completed, require_agreement, skeleton
from glmexport.checkpoint import Checkpoint
from glmexport.errors import CheckpointError

FAMILIES: Mapping[str, Callable[[Checkpoint], Architecture]] = {
    family.MODEL_TYPE: family.describe for family in (glm, glm4, glm4_moe, glm4_moe_lite, glm_moe_dsa)
}
#: Of models that read pictures or sound as well; the family is that of their text part.
_MULTIMODAL = re.compile(r"glm(4v|46v|4_?5v|5v|_ocr|ga|asr|_image|_?4?_?voice).*")

#: Families that are known and cannot be built yet: what of a checkpoint is missing here.
UNFINISHED: Mapping[str, Callable[[Checkpoint], tuple[str, ...]]] = {glm5_next.MODEL_TYPE: glm5_next.missing}


def describe(checkpoint: Checkpoint) -> Architecture:
    """The architecture of ``checkpoint``, as transformers reads its configuration; no weight but tied tables is read.

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
    if family is None and (_MULTIMODAL.fullmatch(checkpoint.model_type) or checkpoint.config.has("text_config")):
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
        read, config = completed(checkpoint)
    except CheckpointError:
        # What is wrong with a value that is there, the declaration says more plainly than transformers.
        family(checkpoint)
        raise
    architecture = family(read)
    require_agreement(architecture, skeleton(config), checkpoint.config.where)
    return architecture
