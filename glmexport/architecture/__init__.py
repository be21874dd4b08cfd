"""What a checkpoint's model consists of: one declaration file a family, detected by ``model_type``."""

from glmexport.architecture.description import (
    Architecture,
    DecoderLayer,
    GatedMlp,
    GroupedQueryAttention,
    Linear,
    Norm,
    Rotary,
    Unused,
)
from glmexport.architecture.experts import MixtureOfExperts, Router
from glmexport.architecture.reference import Block, Reference
from glmexport.architecture.registry import FAMILIES, describe

__all__ = [
    "FAMILIES",
    "Architecture",
    "Block",
    "DecoderLayer",
    "GatedMlp",
    "GroupedQueryAttention",
    "Linear",
    "MixtureOfExperts",
    "Norm",
    "Reference",
    "Rotary",
    "Router",
    "Unused",
    "describe",
]
