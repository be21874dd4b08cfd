"""The cost of a build from the description alone: bundle bytes, peak memory, time. No weight is read."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from glmexport.architecture.description import Architecture
from glmexport.formats.codecs import stored_bits
from glmexport.formats.plan import FormatPlan
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.target import Target
from glmexport.lowering.embedding import FUSED
from glmexport.quantization.allocation import count_trials, total_bits
from glmexport.quantization.memory import plan_memory
from glmexport.reference.reference import CPU

#: Number of tokens that a default validation runs, times the passes it makes over them.
_VALIDATION_TOKEN_PASSES = 21 * (2 * 2048 + 4 * 512)


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
    seconds: float


def estimate(
    planned: Planned,
    flops_per_s: float,
    limit_bytes: int | None,
    device_flops_per_s: float | None = None,
    ranks: int = 1,
) -> BuildEstimate:
    """Return the figures for building a ``planned`` bundle on a machine of that speed under that memory limit.

    ``device_flops_per_s`` is the speed of the device that quantizes, if it is not the one that validates. Of several
    ``ranks`` each is that fast, and all quantize.
    """
    architecture, recipe, target = planned.architecture, planned.recipe, planned.target
    shapes = architecture.shapes()
    bits = planned.plan.bits(shapes)
    if recipe.budget:
        bits = total_bits(architecture, recipe.budget)
    return BuildEstimate(
        bundle_bytes=(bits + _draft_bits(planned) + _repeated_bits(planned) - _halved_bits(planned)) // 8
        + architecture.rotary_bytes * _width(target) // 32,
        bits_per_weight=bits / sum(math.prod(shape) for shape in shapes.values()),
        peak_memory_bytes=plan_memory(architecture, recipe, limit_bytes).peak_bytes,
        seconds=_flops(architecture, recipe) / (device_flops_per_s or flops_per_s) / ranks
        + _forward_flops(architecture) * _VALIDATION_TOKEN_PASSES / flops_per_s,
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


def measured_flops(device: torch.device = CPU) -> float:
    """Measure the fp32 operations per second of a matrix product on ``device``, with torch's present threads."""
    size = 1024
    matrix = torch.ones(size, size, device=device)
    float((matrix @ matrix).sum())
    started = time.perf_counter()
    product = matrix
    for _ in range(3):
        product = matrix @ matrix
    # A device computes asynchronously: only reading a result waits for it.
    float(product[0, 0])
    return 3 * 2 * size**3 / (time.perf_counter() - started)


def _tokens_share(architecture: Architecture) -> dict[str, float]:
    """Return the share of the tokens that pass each routed matrix, by weight key."""
    return {key: layer.mlp.routed_share for layer in architecture.layers for key in layer.mlp.routed}


def _forward_flops(architecture: Architecture) -> float:
    """Return the operations of a forward pass of one token."""
    share = _tokens_share(architecture)
    return 2.0 * sum(
        linear.out_features * linear.in_features * share.get(linear.weight, 1.0) for _, linear in architecture.linears
    )


def _flops(architecture: Architecture, recipe: Recipe) -> float:
    """Return the operations of quantization; multiply-adds count twice.

    They are forward passes, Hessians, factorisations, sweeps and rounds.
    """
    forward, total = _forward_flops(architecture), 0.0
    if recipe.budget:
        # Every trial goes through half of the model on average, and through the lm_head.
        trials = count_trials(architecture, recipe)
        head = 2.0 * architecture.lm_head.out_features * architecture.lm_head.in_features
        total += (forward / 2 + head) * recipe.budget.probe_tokens * trials
    if recipe.needs_calibration and recipe.calibration:
        tokens = recipe.calibration.tokens
        streams = 2 if recipe.solver.asymmetric else 1
        total += streams * forward * tokens
        share = _tokens_share(architecture)
        taps = {
            (layer, linear.tap): (linear.in_features, share.get(linear.weight, 1.0))
            for layer, linear in architecture.linears
        }
        total += sum(2.0 * streams * tokens * part * size**2 + size**3 / 3 for size, part in taps.values())
        # Sweep (half a product), comparison with round-to-nearest (at most the same), each round's projection and one
        # before them, and the correction to the original's outputs, which routed experts do not get.
        solver, routed = recipe.solver, architecture.routed
        for _, linear in architecture.linears:
            expert = linear.weight in routed
            rounds = solver.expert_polish_rounds if expert else solver.polish_rounds
            products = 1 + (rounds + 1 if rounds else 0) + (0 if expert else streams - 1)
            total += products * 2.0 * linear.out_features * linear.in_features**2
    return total
