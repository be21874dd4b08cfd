"""The decoder as a graph of our own operators, built from the declaration. Never traced, and without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from glmexport.architecture.description import Architecture, DecoderLayer, GatedMlp, Linear, Norm
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.architecture.latent import LatentAttention
from glmexport.architecture.token_prediction import TokenPrediction
from glmexport.bundle.names import (
    ATTENTION_MASK,
    BLOCK_NAME,
    HIDDEN,
    INPUT_IDS,
    LOGITS,
    PAST,
    PAST_HIDDEN,
    PRESENT,
    RECENT_LOGITS,
    SHORT_STEP,
    STREAM_IN,
    STREAM_OUT,
)
from glmexport.foundation.target import GraphLimits
from glmexport.graph.latent import LatentLayers
from glmexport.graph.operators import BLOCK, DOMAIN


def own_loop(architecture: Architecture, limits: GraphLimits) -> bool:
    """Return whether a loop of ours decodes with the graph over latents, and not onnxruntime-genai over heads."""
    return (
        limits.latent_cache and not limits.static_shapes and architecture.latent_values_per_token is not None
    )


def cache_bytes_per_token(architecture: Architecture, limits: GraphLimits) -> int:
    """Return the bytes that a token of context adds to the caches of all layers.

    Scales of a quantized cache are per layer.
    """
    if own_loop(architecture, limits):
        assert architecture.latent_values_per_token is not None
        return 4 * architecture.latent_values_per_token
    bits = {"activations": 32 if limits.activations == "float32" else 16, "int8": 8, "int4": 4}[limits.kv_cache]
    return architecture.kv_values_per_token * bits // 8


def build_graph(architecture: Architecture, limits: GraphLimits, *, every_position: bool) -> ir.Model:
    """Build the graph of ``architecture``: token ids and cache in, logits and grown cache out.

    The graph that generates gives logits [B, R, V] of all new positions of a step of at most ``SHORT_STEP``, so that
    drafted tokens can be verified, and of the last one of a longer step. onnxruntime-genai wants [B, 1, V] of the last
    one, and gets the others by another name. Where drafts are made of them, hidden states [B, S, D] leave it too.

    Args:
        architecture: what to build.
        limits: opset and IR version, and what is cached.
        every_position: logits [B, S, V] of all new positions, whatever their number, and nothing but those.
    """
    builder = _Builder(architecture, limits)
    return builder.finished(builder.scores(architecture) if every_position else builder.generates(architecture))


def build_draft(architecture: Architecture, limits: GraphLimits) -> ir.Model:
    """Build the graph of the layer that predicts further ahead: token ids, their hidden states, and caches in.

    Out come logits [B, 1, V] and hidden states [B, 1, D] of the last position, and the caches.
    """
    assert architecture.token_prediction is not None
    builder = _Builder(architecture, limits)
    return builder.finished(builder.draft(architecture.token_prediction))


def build_part(architecture: Architecture, layers: Sequence[DecoderLayer], limits: GraphLimits) -> ir.Model:
    """Build a graph of ``layers``, from one residual stream [B, S, D] to the next; of none of them: norm and lm_head.

    The parts one after the other compute what the whole graph does, each in a session and in memory of its own. Token
    ids are an input only for their shape.
    """
    builder = _Builder(architecture, limits)
    return builder.finished([builder.part(layers)])


#: Element types of cached keys and values; floats become the target's later. Two 4-bit codes are in a byte.
_CACHES = {"activations": ir.DataType.FLOAT, "int8": ir.DataType.INT8, "int4": ir.DataType.UINT8}


class _Builder:
    def __init__(self, architecture: Architecture, limits: GraphLimits) -> None:
        self.architecture, self.limits = architecture, limits
        self.batch: str | int = "batch"
        self.nodes: list[ir.Node] = []
        self.block = ""
        #: Positions of the layer at hand that anything behind its attention is asked for; None: all.
        self.asked: Callable[[ir.Value], ir.Value] | None = None
        self.input_ids = _value(INPUT_IDS, ir.DataType.INT64, ["batch", "sequence"])
        #: The value that tells attention where the new positions are.
        self.mask = _value(ATTENTION_MASK, ir.DataType.INT64, ["batch", "total_sequence"])
        self.inputs = [self.input_ids, self.mask]
        self.outputs: list[ir.Value] = []
        self.latent = LatentLayers(self, limits.latent_cache)

    def finished(self, results: Sequence[ir.Value]) -> ir.Model:
        limits = self.limits
        graph = ir.Graph(
            self.inputs,
            [*results, *self.outputs],
            nodes=self.nodes,
            opset_imports={"": limits.opset, DOMAIN: 1},
            name=self.architecture.family,
        )
        return ir.Model(graph, ir_version=limits.ir_version, producer_name="glmexport")

    def scores(self, architecture: Architecture) -> list[ir.Value]:
        return [self.logits(LOGITS, self.norm(architecture.final_norm, self.stream(architecture)), "sequence")]

    def generates(self, architecture: Architecture) -> list[ir.Value]:
        if drafts := bool(architecture.token_prediction):
            # Of all positions, which the draft's layer caches too.
            stream = self.norm(architecture.final_norm, self.stream(architecture))
            self.declare(stream, HIDDEN, ["sequence", architecture.hidden_size])
            normed = self.recent(stream)
        else:
            normed = self.norm(architecture.final_norm, self.stream(architecture, self.recent))
        if own_loop(architecture, self.limits):
            last = self.logits(LOGITS, normed, "recent")
        else:
            every = self.logits(RECENT_LOGITS, normed, "recent")
            last = self.declare(self.last(every), LOGITS, [1, architecture.vocabulary_size])
            self.outputs.append(every)
        if drafts:
            self.outputs.append(stream)
        return [last]

    def draft(self, draft: TokenPrediction) -> list[ir.Value]:
        past = _value(PAST_HIDDEN, ir.DataType.FLOAT, ["batch", "sequence", draft.hidden_size])
        self.inputs.append(past)
        self.block = "draft"
        embedded = self.norm(draft.embedding_norm, self.embedding(draft.embedding))
        joined = ir.Value()
        self.node("Concat", [embedded, self.norm(draft.hidden_norm, past)], [joined], domain="", axis=-1)
        self.asked = self.last
        last = self.norm(draft.final_norm, self.layer(draft.layer, self.linears(joined, [draft.projection])))
        return [self.logits(LOGITS, last, 1, draft.lm_head), self.declare(last, HIDDEN, [1, draft.hidden_size])]

    def embedding(self, key: str) -> ir.Value:
        block, self.block = self.block, "embedding"
        embedded = self.op("Embedding", [self.input_ids], weight=key)
        self.block = block
        return embedded

    def recent(self, x: ir.Value) -> ir.Value:
        return self.op("RecentPositions", [x, self.mask], most=SHORT_STEP)

    def last(self, x: ir.Value) -> ir.Value:
        return self.op("LastPosition", [x, self.mask])

    def stream(self, architecture: Architecture, asked: Callable[[ir.Value], ir.Value] | None = None) -> ir.Value:
        """What the final norm reads, [B, S, D], or of the positions that ``asked`` takes out of that."""
        hidden = self.embedding(architecture.embedding)
        for layer in architecture.layers:
            self.asked = asked if layer is architecture.layers[-1] else None
            self.block = BLOCK_NAME.format(layer=layer.index)
            hidden = self.layer(layer, hidden)
        self.block = "head"
        return hidden

    def part(self, layers: Sequence[DecoderLayer]) -> ir.Value:
        sizes: tuple[str | int, ...] = ("sequence", self.architecture.hidden_size)
        stream = _value(STREAM_IN, ir.DataType.FLOAT, ["batch", *sizes])
        self.inputs.append(stream)
        for layer in layers:
            self.block = BLOCK_NAME.format(layer=layer.index)
            stream = self.layer(layer, stream)
        if layers:
            return self.declare(stream, STREAM_OUT, sizes)
        self.block = "head"
        return self.logits(LOGITS, self.norm(self.architecture.final_norm, stream), "sequence")

    def logits(self, name: str, normed: ir.Value, positions: str | int, head: Linear | None = None) -> ir.Value:
        head = head or self.architecture.lm_head
        block, self.block = self.block, "head"
        logits = self.linears(normed, [head])
        self.block = block
        return self.declare(logits, name, [positions, head.out_features])

    def declare(self, value: ir.Value, name: str, shape: Sequence[str | int]) -> ir.Value:
        """Name and type of an output of the graph; ``shape`` without the batch."""
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape([self.batch, *shape])
        return value

    def layer(self, layer: DecoderLayer, hidden: ir.Value) -> ir.Value:
        attended = self.attention(layer, self.norm(layer.attention_norm, hidden))
        if self.asked:
            hidden = self.asked(hidden)
        if layer.attention_output_norm:
            attended = self.norm(layer.attention_output_norm, attended)
        hidden = self.add(attended, hidden)
        normed = self.norm(layer.mlp_norm, hidden)
        output = (
            self.mixture(layer.mlp, normed) if isinstance(layer.mlp, MixtureOfExperts) else self.mlp(layer.mlp, normed)
        )
        if layer.mlp_output_norm:
            output = self.norm(layer.mlp_output_norm, output)
        return self.add(output, hidden)

    def mlp(self, mlp: GatedMlp, normed: ir.Value) -> ir.Value:
        gate_up = self.linears(normed, [mlp.gate_up])
        gated = self.op("GatedActivation", [gate_up], intermediate_size=mlp.intermediate_size)
        return self.linears(gated, [mlp.down])

    def mixture(self, mixture: MixtureOfExperts, normed: ir.Value) -> ir.Value:
        router = mixture.router
        logits = self.op(
            "Linear",
            [normed],
            weights=[router.weight],
            in_features=router.in_features,
            out_features=router.experts,
            float32=1,
        )
        experts, weights = ir.Value(), ir.Value()
        self.node(
            "Route",
            [logits],
            [experts, weights],
            bias=router.bias,
            experts=router.experts,
            chosen=router.chosen,
            groups=router.groups,
            kept_groups=router.kept_groups,
            normalized=int(router.normalized),
            scale=router.scale,
        )
        routed = self.op(
            "RoutedExperts",
            [normed, experts, weights],
            gate_up=[expert.gate_up.weight for expert in mixture.experts],
            down=[expert.down.weight for expert in mixture.experts],
            hidden_size=router.in_features,
            intermediate_size=mixture.experts[0].intermediate_size,
        )
        return routed if mixture.shared is None else self.add(routed, self.mlp(mixture.shared, normed))

    def attention(self, layer: DecoderLayer, normed: ir.Value) -> ir.Value:
        attention = layer.attention
        if isinstance(attention, LatentAttention):
            return self.latent.attention(layer.index, attention, normed)
        projected = [self.linears(normed, [part]) for part in (attention.query, attention.key, attention.value)]
        for index, norm in enumerate(attention.norms):
            projected[index] = self.op(
                "HeadNorm", [projected[index]], weight=norm.weight, epsilon=norm.epsilon, head_dim=norm.size
            )

        past, present = self.head_caches(layer.index, attention.kv_heads, attention.head_dim)
        attended = ir.Value()
        self.node(
            "Attention",
            [*projected, *past, self.mask],
            [attended, *present],
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            scale=attention.scale,
            rotary_dimensions=attention.rotary.dimensions,
            interleaved=int(attention.rotary.interleaved),
        )
        return self.attention_output(attention.output, attended)

    def attention_output(self, output: Linear, attended: ir.Value) -> ir.Value:
        """What ``attended`` [B, S, K] adds to the stream, of the positions that anybody asks for.

        The others have to be cached, but in the last layer a prefill has no further use for them: it spares them the
        layer's other matrices.
        """
        return self.linears(self.asked(attended) if self.asked else attended, [output])

    def head_caches(self, layer: int, heads: int, size: int) -> tuple[list[ir.Value], list[ir.Value]]:
        """Keys and values [B, heads, length, size] of the past, and those of the present; half as wide in 4 bits."""
        dtype = _CACHES[self.limits.kv_cache]
        width = size // 2 if self.limits.kv_cache == "int4" else size
        past, present = (
            [self.cache(name, layer, kind, [heads, length, width], dtype) for kind in ("key", "value")]
            for name, length in ((PAST, "past_sequence"), (PRESENT, "total_sequence"))
        )
        return past, present

    def cache(
        self, name: str, layer: int, kind: str, shape: Sequence[str | int], dtype: ir.DataType = ir.DataType.FLOAT
    ) -> ir.Value:
        """A cache of the graph's inputs or outputs, by its ``name``; ``shape`` without the batch."""
        value = _value(name.format(layer=layer, kind=kind), dtype, [self.batch, *shape])
        (self.inputs if name == PAST else self.outputs).append(value)
        return value

    def norm(self, norm: Norm, x: ir.Value) -> ir.Value:
        return self.op("RmsNorm", [x], weight=norm.weight, epsilon=norm.epsilon)

    def linears(self, x: ir.Value, parts: Sequence[Linear]) -> ir.Value:
        biases = [part.bias_key for part in parts if part.bias_key]
        attributes: dict[str, Any] = {"biases": biases} if biases else {}
        return self.op(
            "Linear",
            [x],
            weights=[part.weight for part in parts],
            in_features=parts[0].in_features,
            out_features=sum(part.out_features for part in parts),
            **attributes,
        )

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        total = ir.Value()
        self.node("Add", [a, b], [total], domain="")
        return total

    def op(self, operator: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        output = ir.Value()
        self.node(operator, inputs, [output], **attributes)
        return output

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        domain: str = DOMAIN,
        **attributes: Any,
    ) -> None:
        # Names follow from the position in the graph, so that the same declaration gives the same bytes.
        name = f"{self.block}/{operator}_{len(self.nodes)}"
        for index, output in enumerate(outputs):
            output.name = output.name or f"{name}.{index}"
        self.nodes.append(
            ir.Node(
                domain,
                operator,
                inputs,
                ir.convenience.convert_attributes(attributes),
                outputs=outputs,
                name=name,
                metadata_props={BLOCK: self.block},
            )
        )


def _value(name: str, dtype: ir.DataType, shape: Sequence[str | int | None]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
