"""The recipes that a tuning tries: the start's, those that are named, or the shipped ones of the start's bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glmexport.foundation.definition import names
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import RECIPES, STORED, Recipe, open_recipe
from glmexport.foundation.target import Target
from glmexport.workflows.checks import refuse_formats
from glmexport.workflows.job import Job, recipe_for
from glmexport.workflows.original import Original


def recipes_to_try(
    original: Original, target: Target, given: Sequence[str], progress: Progress
) -> dict[str, Recipe]:
    """Return the recipes to try, by what a target calls them by; the start's first.

    Raises:
        DefinitionError: there is none of that name.
        InputError: the target has no kernels for one that was named.
    """
    start = recipe_for(original, None, target)
    default = STORED if start.keeps_stored else _called(target.weights.default_recipe)
    recipes = {default: start}
    refuse_formats(original, Job(target, start, Path()))
    if start.budget:
        progress.remark(f"The recipe {start.name} chooses formats by a budget; {_formats(start)} is measured instead.")
    if start.keeps_stored:
        if given:
            recipe_for(original, given[0], target)
        return recipes
    for name in given:
        recipe = recipe_for(original, name, target)
        refuse_formats(original, Job(target, recipe, Path()))
        recipes.setdefault(_called(name), recipe)
    if given or start.linears is None or start.budget:
        return recipes
    for name in names(RECIPES):
        recipe = open_recipe(name)
        alike = recipe.solver.method == start.solver.method and recipe.budget is None
        if not alike or recipe.linears is None or recipe.linears.bits != start.linears.bits:
            continue
        try:
            refuse_formats(original, Job(target, recipe, Path()))
        except InputError:
            # Not a format of the target's, or not one for a model of this size.
            continue
        recipes.setdefault(name, recipe)
    return recipes


def _called(recipe: str) -> str:
    """Return a name by which a file is found again from wherever the tuned target is used."""
    return str(Path(recipe).absolute()) if recipe.endswith(".toml") else recipe


def _formats(recipe: Recipe) -> str:
    return recipe.linears.label if recipe.linears else "full precision"
