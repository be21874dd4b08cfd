"""What to calibrate on: text by language and split, packed sequences, and the Hessian of every tap."""

from glmexport.calibration.corpus import (
    USER,
    Document,
    TextOverlap,
    evaluation_documents,
    fingerprint,
    overlap,
    shipped_documents,
    shipped_languages,
    user_documents,
)
from glmexport.calibration.hessian import Hessian, SecondMoment
from glmexport.calibration.sequences import CalibrationSet, effective_count, pack

__all__ = [
    "USER",
    "CalibrationSet",
    "Document",
    "Hessian",
    "SecondMoment",
    "TextOverlap",
    "effective_count",
    "evaluation_documents",
    "fingerprint",
    "overlap",
    "pack",
    "shipped_documents",
    "shipped_languages",
    "user_documents",
]
