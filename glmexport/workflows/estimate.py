"""The sizes of a build from the description alone: bundle bytes, peak memory. No weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from glmexport.architecture.description import Architecture
from glmexport.bundle.fit import loaded_bytes
from glmexport.formats.codecs import stored_bits
from glmexport.formats.plan import FormatPlan
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.target import Target
from glmexport.lowering.embedding import FUSED
from glmexport.quantization.allocation import total_bits
from glmexport.quantization.memory import plan_memory


@dataclass(frozen=True)
class Planned:
    """The parts of a bundle that is to be built, known before any weight is read."""

    architecture: Architecture
    recipe: Recipe
    target: Target
    plan: FormatPlan


@dataclass(frozen=True)
class BuildEstimate:
    """Expected figures of one build."""

    bundle_bytes: int
    bits_per_weight: float
    peak_memory_bytes: int
    #: The memory that the bundle takes once it is loaded for a processor.
    loaded_bytes: int


def estimate(planned: Planned, limit_bytes: int | None) -> BuildEstimate:
    """Return the figures for building a ``planned`` bundle under that memory limit."""
    architecture, recipe, target = planned.architecture, planned.recipe, planned.target
    shapes = architecture.shapes()
    bits = planned.plan.bits(shapes)
    if recipe.budget:
        bits = total_bits(architecture, recipe.budget)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    stored = (bits + _draft_bits(planned) + _repeated_bits(planned) - _halved_bits(planned)) // 8
    stored += architecture.rotary_bytes * _width(target) // 32
    return BuildEstimate(
        bundle_bytes=stored,
        bits_per_weight=bits / parameters,
        peak_memory_bytes=plan_memory(architecture, recipe, limit_bytes).peak_bytes,
        loaded_bytes=loaded_bytes(stored, parameters, recipe),
    )


def _draft_bits(planned: Planned) -> int:
    """Return the bits of the layer that drafts, if there is one, where it stores copies of no table."""
    draft = planned.architecture.token_prediction
    if draft is None:
        return 0
    copied = {draft.embedding, draft.lm_head.weight}
    return planned.plan.bits({key: shape for key, shape in draft.own_shapes().items() if key not in copied})


def _repeated_bits(planned: Planned) -> int:
    """Return the bits of what a graph stores once more than the plan counts.

    One table that is embedding and lm_head lies there twice where its product reads it the other way round: in QDQ
    form, and in full precision. Where rows are looked up by the runtime's own operator, the zero points of a symmetric
    embedding are spelled out.
    """
    architecture, target = planned.architecture, planned.target
    shape = (architecture.vocabulary_size, architecture.hidden_size)
    form = planned.plan.form(architecture.embedding)
    bits = 0
    if architecture.tied and form is None:
        bits += math.prod(shape) * _width(target)
    elif architecture.tied and target.weights.form == "QDQ":
        bits += stored_bits(shape, form)
    if form is not None and form.symmetric and target.can(FUSED):
        bits += stored_bits(shape, form.model_copy(update={"symmetric": False})) - stored_bits(shape, form)
    return bits


def _halved_bits(planned: Planned) -> int:
    """Return the bits that tensors in full precision have less than in fp32, in the type of the target's activations.

    Norms in standard arithmetic and routers are computed in fp32, and stored so.
    """
    architecture, target = planned.architecture, planned.target
    exact = {key for layer in architecture.layers for key in layer.mlp.kept}
    if target.graph.norm == "arithmetic":
        norms = [norm for layer in architecture.layers for norm in layer.norms]
        exact |= {norm.weight for norm in (*norms, architecture.final_norm)}
    shapes = architecture.shapes().items()
    full = sum(math.prod(shape) for key, shape in shapes if planned.plan.form(key) is None and key not in exact)
    return full * (32 - _width(target))


def _width(target: Target) -> int:
    """Return the bits of the type of the target's activations."""
    return 32 if target.graph.activations == "float32" else 16
