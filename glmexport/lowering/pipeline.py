"""The passes by which our operators become the target's. Each asks what the target can do, never its name."""

from __future__ import annotations

import onnx_ir as ir
import torch

from glmexport.foundation.target import Target
from glmexport.graph.operators import DOMAIN, violations
from glmexport.lowering.asked_position import LowerAskedPositionPass
from glmexport.lowering.attention import LowerAttentionPass
from glmexport.lowering.embedding import LowerEmbeddingPass
from glmexport.lowering.experts import LowerExpertsPass
from glmexport.lowering.fixed_attention import LowerFixedAttentionPass
from glmexport.lowering.head_norm import LowerHeadNormPass
from glmexport.lowering.last_position import LowerLastPositionPass, LowerRecentPositionsPass
from glmexport.lowering.latent import LowerExpandedAttentionPass, LowerLatentAttentionPass, LowerSplitLatentPass
from glmexport.lowering.linear import LowerLinearPass
from glmexport.lowering.mlp import LowerGatedActivationPass
from glmexport.lowering.norm import LowerNormPass
from glmexport.lowering.pack_qkv import PackQkvPass
from glmexport.lowering.precision import ActivationTypePass
from glmexport.lowering.rewrite import MICROSOFT
from glmexport.lowering.route import LowerRoutePass
from glmexport.lowering.selection import LowerIndexSelectionPass
from glmexport.quantization.weights import Weights


def lower(
    model: ir.Model, target: Target, weights: Weights, rotary_tables: tuple[torch.Tensor, torch.Tensor]
) -> ir.Model:
    """Lower ``model`` in place for ``target`` and check that only operators it lists are left.

    Args:
        model: as ``build_graph`` returns it, or ``build_fixed`` where the target has fixed shapes only.
        target: what the hardware can do.
        weights: formats now, numbers when the graph is written.
        rotary_tables: cos and sin [context_length, rotary dimensions / 2] fp32.
    """
    broken = violations(model)
    assert not broken, broken
    fixed = target.graph.static_shapes
    passes: list[ir.passes.PassBase] = [PackQkvPass(weights)] if target.graph.packed_qkv else []
    passes += [
        LowerEmbeddingPass(weights, target),
        LowerNormPass(weights, target),
        LowerSplitLatentPass(),
        LowerExpandedAttentionPass(),
        LowerLatentAttentionPass(weights, rotary_tables),
        LowerIndexSelectionPass(weights, rotary_tables),
        LowerHeadNormPass(weights, target),
        LowerFixedAttentionPass(rotary_tables) if fixed else LowerAttentionPass(target, rotary_tables),
        LowerLastPositionPass(),
        LowerRecentPositionsPass(),
        LowerAskedPositionPass(),
        LowerRoutePass(weights),
        LowerExpertsPass(),
        LowerGatedActivationPass(),
        LowerLinearPass(weights, target),
        ActivationTypePass(target),
    ]
    ir.passes.Sequential(*passes)(model)
    model.graph.opset_imports.pop(DOMAIN)
    if any(node.domain == MICROSOFT for node in model.graph.all_nodes()):
        model.graph.opset_imports[MICROSOFT] = 1
    foreign = unsupported_operators(model, target)
    assert not foreign, foreign
    return model


def unsupported_operators(model: ir.Model, target: Target) -> list[str]:
    """Return the operators of ``model`` that neither the standard opset nor the target's list contains."""
    used = {(node.domain, node.op_type) for node in model.graph.all_nodes()}
    return sorted(f"{domain}::{name}" for domain, name in used if domain and not target.can(f"{domain}::{name}"))
