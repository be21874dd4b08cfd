"""Describe a checkpoint, and estimate its builds for every target; no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from glmexport.architecture.description import Architecture
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.calibration.corpus import shipped_documents
from glmexport.checkpoint.adapter import Adapter
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import InputError
from glmexport.foundation.recipe import Budget
from glmexport.foundation.target import shipped_targets
from glmexport.foundation.work import Range
from glmexport.graph.caches import cache_bytes_per_token
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.conditions import ValidationPlan
from glmexport.workflows.checks import refuse_formats
from glmexport.workflows.cost import build_seconds, total
from glmexport.workflows.estimate import estimate
from glmexport.workflows.job import Job, recipe_for, within
from glmexport.workflows.original import NO_DRAFTS, Original
from glmexport.workflows.unit_costs import UnitCosts, unit_costs

#: The use of the layer that predicts further ahead in a bundle that does not leave it out.
DRAFTS = "drafts"


@dataclass(frozen=True)
class AdapterUpdate:
    """The change that an adapter makes to one matrix."""

    rank: int
    scale: float
    dora: bool


@dataclass(frozen=True)
class MergedAdapter:
    """The adapter that is merged into the checkpoint."""

    name: str
    path: str
    updates: dict[str, AdapterUpdate]
    replaced: list[str]


@dataclass(frozen=True)
class MixtureSummary:
    """The layers that are mixtures of experts: their number, and the experts of one."""

    layers: int
    routed: int
    chosen: int
    groups: int


@dataclass(frozen=True)
class StoredFormats:
    """The formats of a quantized checkpoint, each with the number of its matrices."""

    method: str
    matrices: dict[str, int]


@dataclass(frozen=True)
class DraftLayer:
    """The layer that predicts further ahead, with ``DRAFTS`` or the reason to leave it out for each target."""

    layer: int
    tensors: int
    targets: dict[str, str]


@dataclass(frozen=True)
class TokenizerFacts:
    """The vocabulary of the tokenizer, and how many tokens a character of each corpus language costs it."""

    vocabulary: int
    chat_template: bool
    prefix: list[str]
    special_tokens: list[str]
    tokens_per_character: dict[str, float]


@dataclass(frozen=True)
class TargetEstimate:
    """The expected cost of a build for one target, or why it is refused; sizes in bytes."""

    target: str
    recipe: str
    bundle_bytes: int
    bits_per_weight: float
    peak_memory_bytes: int
    #: The memory that the bundle takes once it is loaded for a processor.
    loaded_bytes: int
    #: The wall seconds of building and validating on this machine, and of each stage of it.
    seconds: Range
    stages: dict[str, Range]
    cache_bytes_per_token: int
    context_length: int
    refused: str | None


@dataclass(frozen=True)
class Inspection:
    """A checkpoint that can be built. The fields are those of the JSON document, in its order."""

    name: str
    path: str
    adapter: MergedAdapter | None
    family: str
    layers: int
    context_length: int
    experts: MixtureSummary | None
    #: The number of parameters by part, and ``all``.
    parameters: dict[str, int]
    bytes: int
    quantization: StoredFormats | None
    dtypes: list[str]
    #: Bytes in fp32 of the keys and values of every head.
    kv_bytes_per_token: int
    #: Bytes in fp32 of the latents, where attention caches those.
    latent_kv_bytes_per_token: int | None
    #: The tensors that no bundle has, and why.
    unused: dict[str, str]
    token_prediction: DraftLayer | None
    tokenizer: TokenizerFacts
    #: Whether other processes disturbed what the estimates rest on, or would disturb a build now.
    busy: bool
    estimates: list[TargetEstimate]


@dataclass(frozen=True)
class Unfinished:
    """A checkpoint of a family that is known and cannot be built yet."""

    name: str
    path: str
    family: str
    parameters: dict[str, int]
    bytes: int
    dtypes: list[str]
    missing: list[str]


def inspect_original(
    original: Original,
    recipe: str | None,
    max_memory: int | None,
    arithmetic: OriginalArithmetic = UNCHECKED,
    budget: Budget | None = None,
    *,
    threads: int | None = None,
    ranks: int = 1,
    measure: bool = False,
) -> Inspection:
    """Describe ``original`` and estimate its builds: by ``recipe``, or by the default recipe of each target.

    Args:
        original: the checkpoint.
        recipe: the name or the file of a recipe; None: each target's.
        max_memory: a limit in bytes for each rank.
        arithmetic: the route of products.
        budget: the limits within which formats are chosen, if there are any.
        threads: the threads of each rank; None: as torch has them.
        ranks: the ranks that share a build.
        measure: measure anew what work costs on this machine, which takes some seconds; else where it is not known.
    """
    if threads:
        torch.set_num_threads(threads)
    costs = unit_costs(arithmetic, anew=measure)
    checkpoint, architecture = original.checkpoint, original.architecture
    latents = architecture.latent_values_per_token
    return Inspection(
        name=checkpoint.name,
        path=str(Path(checkpoint.path)),
        adapter=_adapter(checkpoint.adapter),
        family=architecture.family,
        layers=len(architecture.layers),
        context_length=architecture.context_length,
        experts=_experts(architecture),
        parameters=_parameters(original),
        bytes=checkpoint.bytes,
        quantization=_formats(checkpoint),
        dtypes=_dtypes(checkpoint),
        kv_bytes_per_token=architecture.kv_values_per_token * 4,
        latent_kv_bytes_per_token=None if latents is None else latents * 4,
        unused=original.unused,
        token_prediction=_token_prediction(original),
        tokenizer=_tokenizer(original.tokenizer),
        busy=costs.busy,
        estimates=estimate_targets(original, recipe, max_memory, costs, budget, ranks),
    )


def inspect_unfinished(checkpoint: Checkpoint, missing: tuple[str, ...]) -> Unfinished:
    """Describe a checkpoint that cannot be built; ``missing`` are the parts that are not written yet."""
    return Unfinished(
        name=checkpoint.name,
        path=str(Path(checkpoint.path)),
        family=checkpoint.model_type,
        parameters={"all": checkpoint.parameters},
        bytes=checkpoint.bytes,
        dtypes=_dtypes(checkpoint),
        missing=list(missing),
    )


def _dtypes(checkpoint: Checkpoint) -> list[str]:
    return sorted({entry.dtype for entry in checkpoint.tensors.values()})


def _parameters(original: Original) -> dict[str, int]:
    """Return the number of parameters of each part, and of all."""
    checkpoint, architecture = original.checkpoint, original.architecture
    parts: dict[str, int] = {"embedding": architecture.vocabulary_size * architecture.hidden_size}
    for _, linear in architecture.linears:
        if not (linear is architecture.lm_head and architecture.tied):
            parts[linear.part] = parts.get(linear.part, 0) + linear.in_features * linear.out_features
    routers = sum(math.prod(shape) for layer in architecture.layers for shape in layer.mlp.kept.values())
    if routers:
        parts["router"] = routers
    if architecture.token_prediction:
        shapes = architecture.token_prediction.own_shapes()
        parts["MTP layer"] = sum(math.prod(shape) for shape in shapes.values())
    unused = sum(checkpoint.tensors[key].elements for key in original.unused if key in checkpoint.tensors)
    parts["norms and biases"] = checkpoint.parameters - sum(parts.values()) - unused
    return {**parts, "all": checkpoint.parameters}


def _token_prediction(original: Original) -> DraftLayer | None:
    draft = original.architecture.token_prediction
    if draft is None:
        return None
    fates = {target.name: DRAFTS if original.drafts(target) else NO_DRAFTS for target in shipped_targets()}
    return DraftLayer(draft.layer.index, len(draft.own_shapes()), fates)


def _experts(architecture: Architecture) -> MixtureSummary | None:
    mixtures = [layer.mlp for layer in architecture.layers if isinstance(layer.mlp, MixtureOfExperts)]
    if not mixtures:
        return None
    router = mixtures[0].router
    return MixtureSummary(len(mixtures), router.experts, router.chosen, router.groups)


def _formats(checkpoint: Checkpoint) -> StoredFormats | None:
    """Return the formats of a quantized checkpoint, the most frequent first; None in full precision."""
    if checkpoint.stored.layout is None:
        return None
    return StoredFormats(checkpoint.stored.layout.lower(), dict(Counter(checkpoint.labels.values()).most_common()))


def _adapter(adapter: Adapter | None) -> MergedAdapter | None:
    if adapter is None:
        return None
    updates = {
        key: AdapterUpdate(update.rank, update.scale, update.magnitude is not None)
        for key, update in adapter.updates.items()
    }
    return MergedAdapter(adapter.name, str(adapter.path), updates, sorted(adapter.replaced))


def _tokenizer(tokenizer: Tokenizer) -> TokenizerFacts:
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    texts: dict[str, str] = {}
    for document in shipped_documents("evaluation"):
        texts.setdefault(document.language, document.text)
    return TokenizerFacts(
        vocabulary=tokenizer.vocabulary_size,
        chat_template=tokenizer.has_chat_template,
        prefix=[names.get(token, str(token)) for token in tokenizer.prefix],
        special_tokens=list(tokenizer.special_tokens),
        tokens_per_character={
            language: len(tokenizer.encode(text)) / len(text) for language, text in texts.items()
        },
    )


def estimate_targets(
    original: Original,
    recipe: str | None,
    max_memory: int | None,
    costs: UnitCosts,
    budget: Budget | None = None,
    ranks: int = 1,
) -> list[TargetEstimate]:
    """Return, for every shipped target, what a bundle would take there, and why it is refused if it is.

    ``max_memory`` and the peak of memory are those of each of so many ``ranks``.
    """
    rows = []
    for target in shipped_targets():
        chosen = recipe_for(original, recipe, target)
        if budget:
            chosen = within(chosen, budget, target)
        planned = original.planned(chosen, target)
        architecture, expected = planned.architecture, estimate(planned, max_memory)
        seconds = build_seconds(original, chosen, target, ValidationPlan(), costs, costs, max_memory, ranks)
        refused = None
        try:
            refuse_formats(original, Job(target, chosen, Path()))
        except InputError as error:
            refused = error.message
        rows.append(
            TargetEstimate(
                target=target.name,
                recipe=chosen.name,
                bundle_bytes=expected.bundle_bytes,
                bits_per_weight=expected.bits_per_weight,
                peak_memory_bytes=expected.peak_memory_bytes,
                loaded_bytes=expected.loaded_bytes,
                seconds=total(seconds),
                stages=seconds,
                cache_bytes_per_token=cache_bytes_per_token(architecture, target.graph),
                context_length=architecture.context_length,
                refused=refused,
            )
        )
    return rows
