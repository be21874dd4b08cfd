"""What a checkpoint's model consists of: one declaration file a family, detected by ``model_type``."""

from glmexport.architecture.description import (
    Architecture,
    DecoderLayer,
    GatedMlp,
    Linear,
    Norm,
    Rotary,
    Unused,
)
from glmexport.architecture.experts import MixtureOfExperts, Router
from glmexport.architecture.grouped import GroupedQueryAttention
from glmexport.architecture.latent import Indexer, LatentAttention
from glmexport.architecture.reference import Block, Reference
from glmexport.architecture.registry import FAMILIES, UNFINISHED, describe
from glmexport.architecture.token_prediction import TokenPrediction

__all__ = [
    "FAMILIES",
    "UNFINISHED",
    "Architecture",
    "Block",
    "DecoderLayer",
    "GatedMlp",
    "GroupedQueryAttention",
    "Indexer",
    "LatentAttention",
    "Linear",
    "MixtureOfExperts",
    "Norm",
    "Reference",
    "Rotary",
    "Router",
    "TokenPrediction",
    "Unused",
    "describe",
]
