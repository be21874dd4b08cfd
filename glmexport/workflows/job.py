"""The jobs of a build: for each target its recipe, and the directory that the bundle ends in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmexport.formats.plan import fitted, stored_formats
from glmexport.foundation.errors import InputError
from glmexport.foundation.recipe import STORED, Budget, Format, Recipe, open_recipe
from glmexport.foundation.target import Target
from glmexport.workflows.original import Original, formats_of


@dataclass(frozen=True)
class Job:
    """One target of a build."""

    target: Target
    recipe: Recipe
    directory: Path


def budget_of(bundle_bytes: int | None, bits_per_weight: float | None) -> Budget | None:
    """Return the limit that a user gives, if any.

    Raises:
        InputError: both are given.
    """
    if bundle_bytes and bits_per_weight:
        raise InputError("Both --size and --bpw are given.", next_step="Give the one that matters.")
    if not bundle_bytes and not bits_per_weight:
        return None
    return Budget(bundle_bytes=bundle_bytes, bits_per_weight=bits_per_weight)


def within(recipe: Recipe, budget: Budget, target: Target) -> Recipe:
    """Return ``recipe`` with the limit of ``budget``, and its own candidates or those the target has kernels for.

    Raises:
        InputError: nothing is calibrated by it.
    """
    if not recipe.needs_calibration or recipe.linears is None:
        raise InputError(
            f"The recipe {recipe.name} does not calibrate, so no formats can be chosen for --size or --bpw.",
            next_step="Take a recipe with solver.method gptq.",
        )
    offered = target.weights
    kernels = [form for form in budget.candidates if offered.takes(form)]
    if offered.symmetric_only:
        kernels = [form.model_copy(update={"symmetric": True}) for form in kernels]
    candidates = recipe.budget.candidates if recipe.budget else tuple(kernels)
    limited = budget.model_copy(update={"candidates": candidates})
    name = f"{recipe.name}-{budget.label}"
    return recipe.model_copy(update={"budget": limited, "name": name})


def jobs_of(
    original: Original,
    targets: Sequence[Target],
    recipe: str | None,
    output: Path | None,
    budget: Budget | None = None,
) -> list[Job]:
    """Return a job for each target: its recipe (by default the target's) and the directory the bundle ends in."""
    jobs = []
    adapter = original.checkpoint.adapter
    name = "-".join([original.checkpoint.name, *([adapter.name] if adapter else [])]).replace("/", "--")
    for target in targets:
        chosen = recipe_for(original, recipe, target)
        if budget:
            chosen = within(chosen, budget, target)
        own = Path("bundles") / f"{name}-{chosen.name}-{target.name}"
        jobs.append(
            Job(
                target,
                chosen,
                own if output is None else output if len(targets) == 1 else output / target.name,
            )
        )
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"Two targets are called {twice!r}.", next_step="Name it once, or rename one of the files.")
    return jobs


def recipe_for(original: Original, name: str | None, target: Target) -> Recipe:
    """Return the recipe of that name, with one format for one table.

    The default is that of the target, and ``stored`` for a quantized checkpoint.

    The linears of a recipe that keeps stored codes have the checkpoint's formats; ``linears`` names the one that
    most weights have.

    Raises:
        DefinitionError: there is no such recipe.
        InputError: it would quantize a checkpoint that is quantized already, or keep codes that there are not.
    """
    stored, default = original.checkpoint.quantized, target.weights.default_recipe
    recipe = open_recipe(name or (STORED if original.checkpoint.coded else default))
    if recipe.keeps_stored and (inexact := original.checkpoint.stored.inexact):
        raise InputError(
            f"{inexact}: no bundle can keep the codes of {original.checkpoint.name} ({formats_of(original)}).",
            next_step=f"Name a recipe that rounds what the codes stand for once more, for example --recipe {default}, "
            "or build from the full-precision checkpoint.",
        )
    if not stored and recipe.keeps_stored:
        raise InputError(
            f"The recipe {recipe.name} keeps the codes of a quantized checkpoint, and {original.checkpoint.name} is "
            f"in {formats_of(original) if original.checkpoint.stored.layout else 'full precision'}.",
            next_step=f"Leave --recipe out, or name another, for example {default}.",
        )
    if not stored:
        return fitted(recipe, original.architecture, target.weights)
    if not recipe.keeps_stored:
        raise InputError(
            f"{original.checkpoint.name} is quantized already ({formats_of(original)}); the recipe {recipe.name} would "
            "quantize its rounded weights again.",
            next_step="Leave --recipe out to keep its codes, or build from the full-precision checkpoint.",
        )
    if original.architecture.embedding in stored:
        raise InputError(
            f"{original.checkpoint.name}: the embedding is stored as {stored[original.architecture.embedding].label}, "
            "which bundles do not keep.",
            next_step="Quantize the linears only, with the embedding in full precision.",
        )
    weights: Counter[Format] = Counter()
    for key, form in stored_formats(original.checkpoint).items():
        weights[form] += math.prod(original.checkpoint.shape(key))
    return recipe.model_copy(update={"linears": weights.most_common(1)[0][0]})


















