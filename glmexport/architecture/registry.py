"""The choice of a checkpoint's declaration: by ``model_type`` in its config.json, never by its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from glmexport.architecture import glm, glm4, glm4_moe, glm4_moe_lite, glm5_next, glm_moe_dsa
from glmexport.architecture.description import Architecture
from glmexport.checkpoint.checkpoint import Checkpoint

FAMILIES: Mapping[str, Callable[[Checkpoint], Architecture]] = {
    family.MODEL_TYPE: family.describe for family in (glm, glm4, glm4_moe, glm4_moe_lite, glm_moe_dsa)
}
#: Types of models that read pictures or sound as well; the family is that of their text part.
MULTIMODAL = re.compile(r"glm(4v|46v|4_?5v|5v|_ocr|ga|asr|_image|_?4?_?voice).*")

#: Families that are known and cannot be built yet, each with a function that returns what of a checkpoint is missing
#: here.
UNFINISHED: Mapping[str, Callable[[Checkpoint], tuple[str, ...]]] = {glm5_next.MODEL_TYPE: glm5_next.missing_parts}


