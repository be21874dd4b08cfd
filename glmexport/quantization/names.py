"""The names under which a walk commits what it has done."""

from __future__ import annotations

from glmexport.architecture.description import Architecture, DecoderLayer, GatedMlp, Linear
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.architecture.token_prediction import TokenPrediction
from glmexport.foundation.recipe import Recipe

EMBEDDING, HEAD = "embedding", "head"


def block_step(index: int) -> str:
    """Return the name under which decoder layer ``index`` is committed."""
    return f"block_{index:03d}"


def piece_step(step: str, index: int) -> str:
    """Return the name under which the tap of that index is committed until its whole ``step`` is."""
    return f"{step}.tap_{index}"


def expert_steps(layer: DecoderLayer) -> dict[str, GatedMlp]:
    """Return the names under which the experts of ``layer`` are committed, before the layer itself.

    An ordinary layer has none.
    """
    if not isinstance(layer.mlp, MixtureOfExperts):
        return {}
    mixture, step = layer.mlp, block_step(layer.index)
    steps = {} if mixture.shared is None else {f"{step}.shared": mixture.shared}
    return steps | {f"{step}.expert_{index:03d}": expert for index, expert in enumerate(mixture.experts)}


def committed_with(architecture: Architecture, recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Return the steps of a walk in the order of the model, each with everything that is committed with it.

    That is itself, followed by the experts of its layer where ``recipe`` quantizes any.
    """
    steps: dict[str, tuple[str, ...]] = {EMBEDDING: (EMBEDDING,)}
    for layer in architecture.layers:
        step = block_step(layer.index)
        steps[step] = (step, *(expert_steps(layer) if recipe.quantizes_linears else ()))
    return steps | {HEAD: (HEAD,)}


def draft_steps(draft: TokenPrediction | None) -> dict[str, tuple[Linear, ...]]:
    """Return the names under which the layer that predicts further ahead is committed, and the linears of each."""
    if draft is None:
        return {}
    apart = expert_steps(draft.layer)
    inside = {linear for mlp in apart.values() for linear in mlp.linears}
    rest = tuple(linear for linear in draft.matrices if linear not in inside)
    return {block_step(draft.layer.index): rest} | {step: mlp.linears for step, mlp in apart.items()}
