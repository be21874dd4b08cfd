"""Calibration text of a build: which documents, how long a sequence, and what is kept for caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmexport.calibration.corpus import USER, Document, shipped_documents, user_documents
from glmexport.calibration.sequences import CalibrationSet, pack
from glmexport.foundation.errors import InputError
from glmexport.foundation.recipe import CalibrationPlan, Recipe
from glmexport.workflows.original import Original

#: Tokens that the scales of a quantized cache rest on, at most; a magnitude needs less text than a Hessian.
_CACHE_TOKENS = 16384


@dataclass(frozen=True)
class CalibrationText:
    """The documents that a build calibrates on, and the sequences that they are packed into."""

    documents: list[Document]
    #: None where the recipe calibrates on nothing.
    sequences: CalibrationSet | None


def read_calibration_text(original: Original, recipe: Recipe, paths: Sequence[Path]) -> CalibrationText:
    """Read and pack the documents of the recipe's quota, and those of the user's in ``paths``.

    Raises:
        InputError: the recipe has no place for text of the user's, or the text is too small.
    """
    documents = calibration_documents(original, recipe, paths)
    if recipe.calibration is None:
        return CalibrationText(documents, None)
    return CalibrationText(documents, packed(original, documents, recipe.calibration))


def packed(original: Original, documents: Sequence[Document], plan: CalibrationPlan) -> CalibrationSet:
    """Pack ``documents`` into sequences on which every block can be computed by itself.

    None is longer than what a token attends to without selecting, as others select for several blocks.

    Raises:
        InputError: the text is too small.
    """
    architecture = original.architecture
    longest = min(architecture.context_length, architecture.attended_tokens or architecture.context_length)
    return pack(documents, original.tokenizer, plan, longest)


def calibration_documents(original: Original, recipe: Recipe, paths: Sequence[Path]) -> list[Document]:
    """Return the documents of the recipe's quota, and those of the user's in ``paths``.

    Raises:
        InputError: the recipe has no place for text of the user's.
    """
    if recipe.calibration is None:
        if paths:
            raise InputError(
                f"The recipe {recipe.name} uses no calibration text, but --calibration gives some.",
                next_step="Leave --calibration out, or take a recipe that calibrates.",
            )
        return []
    own = user_documents(paths, original.tokenizer)
    if own and USER not in recipe.calibration.quota:
        raise InputError(
            f"The recipe {recipe.name} has no share for text of yours, but --calibration gives some.",
            next_step=f"Add '{USER} = 40' to [calibration.quota] of the recipe.",
        )
    return [*shipped_documents("calibration", set(recipe.calibration.quota) - {USER}), *own]


def cache_text(calibration: CalibrationSet | None) -> list[list[int]]:
    """Return sequences from all over the calibration text, for the scales of a quantized cache."""
    if calibration is None:
        return []
    count, length = calibration.ids.shape
    every = max(1, math.ceil(count * length / _CACHE_TOKENS))
    return [[int(token) for token in ids] for ids in calibration.ids[::every].tolist()]
