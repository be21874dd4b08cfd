"""Which format a matrix has under a recipe: asked by what refuses, what estimates and what rounds, answered here."""

from __future__ import annotations

from glmexport.architecture.description import Architecture
from glmexport.foundation.recipe import Format, Recipe
from glmexport.foundation.target import WeightFormats


def planned_formats(architecture: Architecture, recipe: Recipe) -> dict[str, Format | None]:
    """Format of every matrix that can have one, by weight key; None: full precision.

    One table that is embedding and lm_head has the format of the embedding, as its codes are fixed before the head has
    activations to be fitted to. Of a layer that drafts, what belongs to it alone is among them.
    """
    routed, draft = architecture.routed, architecture.token_prediction
    forms: dict[str, Format | None] = {
        linear.weight: recipe.linear(mixture=bool(routed), routed=linear.weight in routed)
        for _, linear in architecture.linears
    }
    if draft is not None:
        inside = recipe.linear(mixture=True, routed=False)
        tables = {"lm_head": recipe.lm_head, "embedding": recipe.embedding}
        forms |= {linear.weight: tables.get(linear.part, inside) for linear in draft.matrices}
    return forms | {architecture.lm_head.weight: recipe.lm_head, architecture.embedding: recipe.embedding}


def products(architecture: Architecture) -> frozenset[str]:
    """Weight keys of what anything is multiplied by: all but a table that rows are only looked up in."""
    keys = {linear.weight for _, linear in architecture.linears}
    if architecture.token_prediction is not None:
        keys |= {linear.weight for linear in architecture.token_prediction.matrices if linear.part != "embedding"}
    return frozenset(keys)


def fitted(recipe: Recipe, architecture: Architecture, offered: WeightFormats) -> Recipe:
    """``recipe`` where one table is embedding and lm_head and the target's products have no zero points.

    Rows of an embedding may have them, and recipes for such targets make use of it; a table that is multiplied by as
    well has the format that the recipe gives to the lm_head.
    """
    embedding, head = recipe.embedding, recipe.lm_head
    if not (architecture.tied and offered.symmetric_only and embedding and head):
        return recipe
    if embedding.symmetric or not head.symmetric or architecture.hidden_size % head.group_size:
        return recipe
    return recipe.model_copy(update={"embedding": head})
