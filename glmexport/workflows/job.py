"""What a build is asked for, and whether it can be done at all: checked before anything is started."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glmexport.architecture.description import Architecture
from glmexport.architecture.rope import context_remark
from glmexport.architecture.tables import remark_on
from glmexport.architecture.token_prediction import share_tables
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.formats.codecs import codec_of
from glmexport.formats.plan import FormatPlan, fitted, stored_formats
from glmexport.foundation.disk import require_free
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import STORED, Budget, Format, Recipe, open_recipe
from glmexport.foundation.target import Target
from glmexport.graph.build import own_loop
from glmexport.graph.fixed import fixed_sizes
from glmexport.graph.heads import unfit_heads
from glmexport.quantization.allocation import probe_bytes, require_fit
from glmexport.reference.describe import describe
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.workflows.estimate import Planned, estimate

#: Why a bundle that onnxruntime-genai decodes has no draft graph.
NO_DRAFTS = (
    "predicts a token further ahead, for speculative decoding, and no answer depends on it; only glmexport's own loop "
    "drafts with it, and onnxruntime-genai runs this bundle"
)


@dataclass(frozen=True)
class Original:
    """An opened checkpoint, what it describes, its tokenizer, and the tensors that are left out and why."""

    checkpoint: Checkpoint
    architecture: Architecture
    tokenizer: Tokenizer
    unused: dict[str, str]

    @classmethod
    def open(cls, source: str, progress: Progress, adapter: str | None = None) -> Original:
        """Open and check, with the adapter that is merged into it, if any; no weight is read."""
        checkpoint = Checkpoint.open(source, progress, adapter)
        architecture = describe(checkpoint)
        checkpoint = architecture.presented(checkpoint)
        unused = dict(architecture.account(checkpoint))
        if remark := remark_on(architecture, checkpoint):
            progress.remark(f"{checkpoint.name}: {remark}.")
        tokenizer = Tokenizer.open(checkpoint.path)
        if tokenizer.vocabulary_size > architecture.vocabulary_size:
            raise InputError(
                f"{checkpoint.name}: the tokenizer has {tokenizer.vocabulary_size} tokens and the model "
                f"{architecture.vocabulary_size}.",
                next_step="Use the tokenizer files that belong to these weights.",
            )
        for remark in filter(None, (tokenizer.remark, context_remark(checkpoint.config, architecture.context_length))):
            progress.remark(remark)
        return cls(checkpoint, architecture, tokenizer, unused)

    def sharing_tables(self) -> Original:
        """With one embedding and one lm_head where the layer that predicts further ahead stores copies: reads them."""
        architecture = share_tables(self.architecture, self.checkpoint)
        return replace(self, architecture=architecture, unused=dict(architecture.account(self.checkpoint)))

    def drafts(self, target: Target) -> bool:
        """Whether a bundle for ``target`` can draft tokens by the layer that predicts further ahead."""
        return self.architecture.token_prediction is not None and own_loop(self.architecture, target.graph)

    def architecture_for(self, target: Target) -> Architecture:
        """What a bundle for ``target`` consists of, with the context that it has."""
        built = self.architecture if self.drafts(target) else replace(self.architecture, token_prediction=None)
        if not target.graph.static_shapes:
            return built
        return replace(built, context_length=fixed_sizes(built, target.graph).capacity)

    def planned(self, recipe: Recipe, target: Target) -> Planned:
        """Return what a bundle of ``recipe``, as ``recipe_for`` gives it, for ``target`` will consist of."""
        architecture = self.architecture_for(target)
        plan = FormatPlan.of(architecture, recipe, stored_formats(self.checkpoint))
        return Planned(architecture, recipe, target, plan)

    def unused_for(self, target: Target) -> dict[str, str]:
        """Tensors that a bundle for ``target`` leaves out, and why."""
        draft = self.architecture.token_prediction
        if draft is None or self.drafts(target):
            return self.unused
        return self.unused | dict.fromkeys(draft.own_shapes(), NO_DRAFTS)


@dataclass(frozen=True)
class Job:
    """One target of a build."""

    target: Target
    recipe: Recipe
    directory: Path


def budget_of(bundle_bytes: int | None, bits_per_weight: float | None) -> Budget | None:
    """The limit that a user gives, if any.

    Raises:
        InputError: both are given.
    """
    if bundle_bytes and bits_per_weight:
        raise InputError("Both --size and --bpw are given.", next_step="Give the one that matters.")
    if not bundle_bytes and not bits_per_weight:
        return None
    return Budget(bundle_bytes=bundle_bytes, bits_per_weight=bits_per_weight)


def _within(recipe: Recipe, budget: Budget, target: Target) -> Recipe:
    """``recipe`` with the limit of ``budget``, and the recipe's own candidates or those the target has kernels for."""
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
    """One job a target: its recipe (the target's default, if none is named) and the directory it ends in."""
    jobs = []
    adapter = original.checkpoint.adapter
    name = "-".join([original.checkpoint.name, *([adapter.name] if adapter else [])]).replace("/", "--")
    for target in targets:
        chosen = recipe_for(original, recipe, target)
        if budget:
            chosen = _within(chosen, budget, target)
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
    """The recipe of that name, or by default the target's, with one format for one table; for a quantized checkpoint
    ``stored``.

    The linears of a recipe that keeps stored codes have the checkpoint's formats; ``linears`` names the one that
    most weights have.

    Raises:
        DefinitionError: there is no such recipe.
        InputError: it would quantize a checkpoint that is quantized already, or keep codes that there are not.
    """
    stored = original.checkpoint.quantized
    recipe = open_recipe(name or (STORED if stored else target.weights.default_recipe))
    if not stored and recipe.keeps_stored:
        raise InputError(
            f"The recipe {recipe.name} keeps the codes of a quantized checkpoint, and {original.checkpoint.name} is "
            "in full precision.",
            next_step=f"Leave --recipe out, or name another, for example {target.weights.default_recipe}.",
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
            f"{original.checkpoint.name}: the embedding is stored in the GPTQ format, which bundles do not keep.",
            next_step="Quantize the linears only, with the embedding in full precision.",
        )
    weights: Counter[Format] = Counter()
    for key, form in stored_formats(original.checkpoint).items():
        weights[form] += math.prod(original.checkpoint.shape(key))
    return recipe.model_copy(update={"linears": weights.most_common(1)[0][0]})


def formats_of(original: Original) -> str:
    """The stored formats of a quantized checkpoint and how many matrices have each, for people."""
    counts = Counter(form.label for form in original.checkpoint.quantized.values())
    return ", ".join(f"{count} x {label}" for label, count in counts.most_common())


def refuse_formats(original: Original, job: Job) -> None:
    """Check that every format of the recipe is one of the target's, and that an embedding's rows are whole groups.

    Raises:
        InputError: one is not, they are not, or the target cannot run the family or hold its caches.
    """
    recipe, offered = job.recipe, job.target.weights
    _refuse_graph(original, job)
    candidates = recipe.budget.candidates if recipe.budget else ()
    plan = original.planned(recipe, job.target).plan
    # Formats once each, and whether anything is multiplied by a matrix that has one.
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
        # Rows of the embedding are made numbers by arithmetic on every such target, zero points or not.
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
    planned, memory = original.planned(job.recipe, job.target), job.target.memory
    expected = estimate(planned, 1.0, None).bundle_bytes
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


def listed_unused(unused: Mapping[str, str]) -> dict[str, str]:
    """The same for people: tensors of one layer that are left out for one reason are one entry."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key, reason in unused.items():
        layer = re.match(r"model\.layers\.\d+\.", key)
        groups.setdefault((layer[0] if layer else key, reason), []).append(key)
    return {
        keys[0] if len(keys) == 1 else f"{name}* ({len(keys)} tensors)": reason
        for (name, reason), keys in groups.items()
    }


def require_space(original: Original, jobs: Sequence[Job]) -> None:
    """Check that a bundle, the committed blocks and the activations of ``jobs`` of one recipe fit beside each other.

    Under a budget the activations are at least those of all trials, which are gone before the walk begins.

    Raises:
        MachineError: they do not.
    """
    architecture, recipe = original.architecture, jobs[0].recipe
    tokens = recipe.calibration.tokens if recipe.calibration else 0
    # Both streams, before a block, between its branches and behind it, and what experts add to them; and what one of
    # its linears reads.
    widest = max(linear.in_features for _, linear in architecture.linears)
    kept = 9 if architecture.routed else 7
    streams = tokens * (kept * architecture.hidden_size + widest) * 4
    activations = max(streams, probe_bytes(architecture, recipe))
    largest = max(estimate(original.planned(recipe, job.target), 1.0, None).bundle_bytes for job in jobs)
    require_free(jobs[0].directory.parent, 2 * largest + activations, "The build")
