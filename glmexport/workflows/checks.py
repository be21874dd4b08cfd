"""The checks that can refuse a build, made before anything takes long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from glmexport.architecture.description import Architecture
from glmexport.formats.codecs import codec_of
from glmexport.foundation.disk import require_free
from glmexport.foundation.errors import InputError
from glmexport.foundation.recipe import Format, Recipe
from glmexport.graph.caches import own_loop
from glmexport.graph.heads import unfit_heads
from glmexport.quantization.allocation import probe_bytes, require_fit
from glmexport.quantization.ranks import ALONE, Ranks
from glmexport.workflows.estimate import estimate
from glmexport.workflows.job import Job
from glmexport.workflows.original import Original

#: Number of copies of the original's states during validation: of the last block, and before and after the present one.
_KEPT_STATES = 3


def refuse_formats(original: Original, job: Job) -> None:
    """Check that every format of the recipe is one of the target's, and that an embedding's rows are whole groups.

    Raises:
        InputError: a format is not, the rows are not, or the target cannot run the family or hold its caches.
    """
    recipe, offered = job.recipe, job.target.weights
    _refuse_graph(original, job)
    candidates = recipe.budget.candidates if recipe.budget else ()
    plan = original.planned(recipe, job.target).plan
    # Each format once, with whether anything is multiplied by a matrix that has it.
    used: dict[Format, bool] = {}
    for key, form in plan.quantized().items():
        used[form] = used.get(form, False) or key in plan.multiplied
    for form, product in {**used, **dict.fromkeys(candidates, True)}.items():
        if not offered.takes(form):
            raise InputError(
                f"The recipe {recipe.name} uses {form.label}, for which the target {job.target.name} has no kernels.",
                next_step=f"Take a recipe of {_alternatives(offered.bits)} bits in groups of "
                f"{_alternatives(offered.group_sizes)}.",
            )
        # Every such target decodes rows of the embedding by arithmetic, with zero points or without.
        if offered.symmetric_only and product and not form.symmetric:
            raise InputError(
                f"The recipe {recipe.name} uses {form.label} with zero points, which the target {job.target.name} has "
                "no place for.",
                next_step=f"Take a symmetric recipe, for example {offered.default_recipe}.",
            )
    for key, form in plan.quantized().items():
        codec = codec_of(form)
        if key in plan.looked_up and not codec.looked_up:
            raise InputError(
                f"The recipe {recipe.name} has the embedding in {form.label}, of which no rows can be looked up.",
                next_step="Take a recipe with another format in [embedding], or without it.",
            )
        if not codec.holds(plan.columns[key]):
            raise InputError(
                f"{key} has {plan.columns[key]} columns, which are no whole groups of {form.label}.",
                next_step="Take a recipe with a smaller group_size, or with another codec.",
            )
    _refuse_sizes(original, job)
    if recipe.budget:
        require_fit(original.architecture, recipe)
    size = original.architecture.hidden_size
    if recipe.embedding and size % recipe.embedding.group_size:
        raise InputError(
            f"The recipe {recipe.name} has groups of {recipe.embedding.group_size} in the embedding, whose rows of "
            f"{size} they do not divide.",
            next_step="Take a recipe with a smaller embedding.group_size, or without [embedding].",
        )


def _refuse_graph(original: Original, job: Job) -> None:
    """Refuse what the target's capabilities rule out, whatever the formats are."""
    architecture, target, limits = original.architecture, job.target, job.target.graph
    if limits.static_shapes:
        _refuse_fixed(original, job)
    if architecture.attended_tokens and not limits.latent_cache:
        raise InputError(
            f"{architecture.family} selects what it attends to by a cache of its own, and the target "
            f"{target.name} has keys and values of heads only.",
            next_step="Take a target with graph.latent_cache = true.",
        )
    if architecture.routed and (not limits.expert_branches or target.weights.form == "QDQ"):
        raise InputError(
            f"{original.checkpoint.name} is a mixture of experts, which the target {target.name} cannot run.",
            next_step="Take a target with graph.expert_branches = true and weights.form = \"MatMulNBits\".",
        )
    unfit = unfit_heads(original.architecture_for(target), target)
    if unfit:
        raise InputError(
            f"{original.checkpoint.name} {unfit}: the target {target.name} cannot run it.",
            next_step="Take another target ('glmexport targets list').",
        )
    if own_loop(architecture, limits) and limits.activations != "float32":
        raise InputError(
            f"The loop that runs {original.checkpoint.name} caches latents in float32, and the target {target.name} "
            f"computes in {limits.activations}.",
            next_step='Take a target with graph.latent_cache = false or graph.activations = "float32".',
        )
    if limits.kv_cache != "activations":
        if own_loop(architecture, limits):
            raise InputError(
                f"{original.checkpoint.name} caches latents for the target {target.name}, which have no "
                f"{limits.kv_cache} form.",
                next_step='Take a target with graph.latent_cache = false or graph.kv_cache = "activations".',
            )
        if job.recipe.calibration is None:
            raise InputError(
                f"The cache of the target {target.name} is quantized with calibrated scales, and the recipe "
                f"{job.recipe.name} has no calibration text.",
                next_step='Take a recipe with [calibration], or a target with graph.kv_cache = "activations".',
            )


def _refuse_fixed(original: Original, job: Job) -> None:
    """Refuse what graphs of fixed shapes cannot hold."""
    architecture, target = original.architecture, job.target
    reason = ""
    if architecture.routed:
        reason = "is a mixture of experts, and which experts are read is decided token by token"
    elif architecture.latent_values_per_token is not None:
        reason = "has latent attention, which is lowered for caches of any length only"
    elif target.graph.kv_cache != "activations":
        reason = f"would have a cache in {target.graph.kv_cache}, which only the fused attention operator reads"
    if reason:
        raise InputError(
            f"The target {target.name} runs graphs of fixed shapes only, and {original.checkpoint.name} {reason}.",
            next_step="Take another target ('glmexport targets list').",
        )


def _refuse_sizes(original: Original, job: Job) -> None:
    """Refuse what the target's memory rules out: known from shapes and formats before anything is computed."""
    planned, memory = original.planned(job.recipe, job.target), job.target.memory
    expected = estimate(planned, None).bundle_bytes
    if memory.max_weight_bytes is not None and expected > memory.max_weight_bytes:
        raise InputError(
            f"The bundle takes about {expected / 2**30:.1f} GiB, and the target {job.target.name} holds "
            f"{memory.max_weight_bytes / 2**30:.1f} GiB.",
            next_step="Take a smaller checkpoint or a recipe of fewer bits.",
        )
    if memory.max_tensor_bytes is None:
        return
    for key, shape in planned.architecture.shapes().items():
        form = planned.plan.form(key)
        held = math.prod(shape) * (32 if form is None else form.bits) // 8
        if len(shape) == 2 and held > memory.max_tensor_bytes:
            raise InputError(
                f"{key} takes {held / 2**20:,.0f} MiB, and the target {job.target.name} holds tensors of at most "
                f"{memory.max_tensor_bytes / 2**20:,.0f} MiB.",
                next_step="Take a recipe of fewer bits for it, or a target with a larger memory.max_tensor_bytes.",
            )


def _alternatives(values: Sequence[int]) -> str:
    return " or ".join(str(value) for value in values)


def refuse_existing(directory: Path, force: bool, mark: str = "bundle.json", kind: str = "a bundle") -> None:
    """Refuse to overwrite an output without ``force``; with it, all but an empty directory or one with ``mark``."""
    if directory.exists() and not force:
        raise InputError(
            f"{directory} exists.", next_step="Choose another directory with -o, or replace it with --force."
        )
    if directory.exists() and not (
        directory.is_dir() and ((directory / mark).is_file() or not any(directory.iterdir()))
    ):
        raise InputError(
            f"{directory} exists and is not {kind}, so --force does not replace it.",
            next_step="Choose another directory with -o.",
        )


def require_space(
    original: Original, quantizations: Sequence[Sequence[Job]], positions: int, ranks: Ranks = ALONE
) -> None:
    """Check that everything that a build has on disk at once fits; jobs of one recipe share one quantization.

    That is the committed blocks of every quantization and all bundles; and in turn the activations of each walk by all
    ``ranks``, and the original's states at the ``positions`` that a bundle is judged on.

    Raises:
        MachineError: it does not.
    """
    kept, passing = 0, positions * _KEPT_STATES * original.architecture.hidden_size * 4
    for jobs in quantizations:
        bundles = [estimate(original.planned(job.recipe, job.target), None).bundle_bytes for job in jobs]
        kept += max(bundles) + sum(bundles)
        passing = max(passing, _activation_bytes(original.architecture, jobs[0].recipe, ranks))
    require_free(quantizations[0][0].directory.parent, kept + passing, "The build")


def _activation_bytes(architecture: Architecture, recipe: Recipe, ranks: Ranks) -> int:
    """Return the most bytes that the activations of one walk take, of all ranks together.

    Under a budget they are at least those of all trials, which are gone before the walk begins.
    """
    tokens = recipe.calibration.tokens if recipe.calibration else 0
    # Both streams: before a block, between its branches and after it, and what experts add to them; and the input of
    # one of its linears.
    widest = max(linear.in_features for _, linear in architecture.linears)
    kept = 9 if architecture.routed else 7
    if architecture.routed and not ranks.alone:
        # Experts read positions of all batches: both streams lie there whole, beside each rank's own part.
        kept += 2
    streams = tokens * (kept * architecture.hidden_size + widest) * 4
    return max(streams, probe_bytes(architecture, recipe))
