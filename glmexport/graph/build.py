"""The decoder as a graph of our own operators, built from the declaration. Never traced, and without weights."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from glmexport.architecture.description import Architecture, DecoderLayer
from glmexport.foundation.target import GraphLimits
from glmexport.graph.builder import GraphBuilder


def build_graph(architecture: Architecture, limits: GraphLimits, *, every_position: bool) -> ir.Model:
    """The graph of ``architecture``: token ids and cache in, logits and grown cache out.

    The graph that generates gives logits [B, R, V] of all new positions of a step of at most ``SHORT_STEP``, so that
    drafted tokens can be verified, and of the last one of a longer step. onnxruntime-genai wants [B, 1, V] of the last
    one, and gets the others by another name. Where drafts are made of them, hidden states [B, S, D] leave it too.

    Args:
        architecture: what to build.
        limits: opset and IR version, and what is cached.
        every_position: logits [B, S, V] of all new positions, whatever their number, and nothing but those.
    """
    builder = GraphBuilder(architecture, limits)
    return builder.finished(builder.scores(architecture) if every_position else builder.generates(architecture))


def build_draft(architecture: Architecture, limits: GraphLimits) -> ir.Model:
    """The graph of the layer that predicts further ahead: token ids, the hidden states that led to them, and caches in.

    Out come logits [B, 1, V] and hidden states [B, 1, D] of the last position, and the caches.
    """
    assert architecture.token_prediction is not None
    builder = GraphBuilder(architecture, limits)
    return builder.finished(builder.draft(architecture.token_prediction))


def build_part(architecture: Architecture, layers: Sequence[DecoderLayer], limits: GraphLimits) -> ir.Model:
    """``layers``, which follow each other, from one residual stream [B, S, D] to the next; none: norm and lm_head.

    The parts one after the other compute what the whole graph does, each in a session and in memory of its own. Token
    ids are an input only for their shape.
    """
    builder = GraphBuilder(architecture, limits)
    return builder.finished([builder.part(layers)])






