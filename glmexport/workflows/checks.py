"""What can refuse a build, and is checked before anything takes long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from glmexport.formats.plan import planned_formats, products
from glmexport.foundation.disk import require_free
from glmexport.foundation.errors import InputError
from glmexport.foundation.recipe import Format, Recipe
from glmexport.graph.caches import own_loop
from glmexport.graph.heads import unfit_heads
from glmexport.quantization.allocation import probe_bytes, require_fit
from glmexport.workflows.estimate import estimate
from glmexport.workflows.job import Job
from glmexport.workflows.original import Original


def refuse_formats(original: Original, job: Job) -> None:
    """Every format of the recipe must be one of the target's, and an embedding's rows must be whole groups.

    Raises:
        InputError: one is not, they are not, or the target cannot run the family or hold its caches.
    """
    recipe, offered = job.recipe, job.target.weights
    _refuse_graph(original, job)
    candidates = recipe.budget.candidates if recipe.budget else ()
    stored = (form.exact for form in original.checkpoint.quantized.values())
    architecture = original.architecture_for(job.target)
    multiplied = products(architecture)
    # Formats once each, and whether anything is multiplied by a matrix that has one.
    used: dict[Format, bool] = {}
    for key, planned in planned_formats(architecture, recipe).items():
        if planned is not None:
            used[planned] = used.get(planned, False) or key in multiplied
    for form, product in {**used, **dict.fromkeys([*candidates, *stored], True)}.items():
        if form.bits not in offered.bits or form.group_size not in offered.group_sizes:
            raise InputError(
                f"The recipe {recipe.name} uses {form.label}, for which the target {job.target.name} has no kernels.",
                next_step=f"Take a recipe of {_alternatives(offered.bits)} bits in groups of "
                f"{_alternatives(offered.group_sizes)}.",
            )
        # Rows of the embedding are made numbers by arithmetic on every such target, zero points or not.
        if offered.symmetric_only and product and not form.symmetric:
            raise InputError(
                f"The recipe {recipe.name} uses {form.label} with zero points, which the target {job.target.name} has "
                "no place for.",
                next_step=f"Take a symmetric recipe, for example {offered.default_recipe}.",
            )
    _refuse_sizes(original, job)
    if recipe.budget and original.architecture.routed:
        raise InputError(
            f"{original.checkpoint.name} is a mixture of experts, and a budget tries every matrix in every format.",
            next_step="Leave --size and --bpw out; [shared] and [linears] of the recipe set the formats.",
        )
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
    """What the target's capabilities rule out, whatever the formats are."""
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
    """What graphs of fixed shapes cannot hold."""
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
    """What the target's memory rules out: known from shapes and formats before anything is computed."""
    architecture, recipe, memory = original.architecture, job.recipe, job.target.memory
    expected = estimate(architecture, recipe, 1.0, None).bundle_bytes
    if memory.max_weight_bytes is not None and expected > memory.max_weight_bytes:
        raise InputError(
            f"The bundle takes about {expected / 2**30:.1f} GiB, and the target {job.target.name} holds "
            f"{memory.max_weight_bytes / 2**30:.1f} GiB.",
            next_step="Take a smaller checkpoint or a recipe of fewer bits.",
        )
    if memory.max_tensor_bytes is None:
        return
    forms = planned_formats(architecture, recipe)
    shapes = architecture.shapes()
    for key, shape in shapes.items():
        form = forms.get(key)
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
    """Nothing is overwritten unless asked for, and then only what has the file ``mark``, or an empty directory."""
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


def require_space(original: Original, recipe: Recipe, parent: Path) -> None:
    """The bundle, the committed blocks and the activations must fit beside each other.

    Under a budget the activations are at least those of all trials, which are gone before the walk begins.
    """
    architecture = original.architecture
    tokens = recipe.calibration.tokens if recipe.calibration else 0
    # Both streams, before a block, between its branches and behind it, and what experts add to them; and what one of
    # its linears reads.
    widest = max(linear.in_features for _, linear in architecture.linears)
    kept = 9 if architecture.routed else 7
    streams = tokens * (kept * architecture.hidden_size + widest) * 4
    activations = max(streams, probe_bytes(architecture, recipe))
    needed = 2 * estimate(architecture, recipe, 1.0, None).bundle_bytes + activations
    require_free(parent, needed, "The build")
