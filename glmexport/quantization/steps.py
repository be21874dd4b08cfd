"""Names under which a walk commits what it has done."""

from __future__ import annotations

from glmexport.architecture.description import DecoderLayer, GatedMlp, Linear
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.architecture.token_prediction import TokenPrediction

EMBEDDING, HEAD = "embedding", "head"


def block_step(index: int) -> str:
    """Name under which decoder layer ``index`` is committed."""
    return f"block_{index:03d}"


def expert_steps(layer: DecoderLayer) -> dict[str, GatedMlp]:
    """Names under which the experts of ``layer`` are committed, before the layer itself; none of an ordinary layer."""
    if not isinstance(layer.mlp, MixtureOfExperts):
        return {}
    mixture, step = layer.mlp, block_step(layer.index)
    steps = {} if mixture.shared is None else {f"{step}.shared": mixture.shared}
    return steps | {f"{step}.expert_{index:03d}": expert for index, expert in enumerate(mixture.experts)}


def draft_steps(draft: TokenPrediction | None) -> dict[str, tuple[Linear, ...]]:
    """Names under which the layer that predicts further ahead is committed, and the linears of each."""
    if draft is None:
        return {}
    apart = expert_steps(draft.layer)
    inside = {linear for mlp in apart.values() for linear in mlp.linears}
    rest = tuple(linear for linear in draft.matrices if linear not in inside)
    return {block_step(draft.layer.index): rest} | {step: mlp.linears for step, mlp in apart.items()}
